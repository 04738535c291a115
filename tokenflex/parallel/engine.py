"""The one place that knows DeepSpeed: configuration, sharded model set-up, backward, step, and its checkpoint calls."""

import contextlib
import json
import logging
import os
import warnings
from pathlib import Path

import torch

from ..errors import UserError
from .slices import before_loading, held_slices, num_updates, publish_weights, set_num_updates

OURS = {
    "train_batch_size": "data.packs_per_step",
    "train_micro_batch_size_per_gpu": "data.packs_per_micro_batch",
    "gradient_accumulation_steps": "data.packs_per_step",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.schedule",
    "fp16": "train.precision",
}
"""Keys of a DeepSpeed configuration that this trainer derives from its own, and from which of its keys."""


def load_ds_config(path):
    """A DeepSpeed JSON file as a dict.

    Raises:
        UserError: no such file, not JSON, or it sets something that the run's own configuration decides.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--ds_config {path}: {error.strerror}; give a DeepSpeed JSON file, for example configs/zero3.json"
        ) from None
    except ValueError as error:
        raise UserError(f"--ds_config {path}: not valid JSON: {error}") from None
    for key, ours in OURS.items():
        if config.get(key, "auto") != "auto":
            raise UserError(f"--ds_config {path}: sets {key}; leave it out (or 'auto') and set {ours} instead")
    return config


def resolve_ds_config(config, precision, num_micro_steps, max_grad_norm):
    """The DeepSpeed configuration that is run: the file's, plus what this trainer decides."""
    resolved = {key: value for key, value in config.items() if key not in OURS}
    resolved.update(
        train_micro_batch_size_per_gpu=1,  # one packed row; its length is the real batch size
        gradient_accumulation_steps=num_micro_steps,
        gradient_clipping=max_grad_norm,
        bf16={**config.get("bf16", {}), "enabled": precision == "bf16"},
        zero_allow_untested_optimizer=True,  # torch's AdamW is handed in
    )
    resolved.setdefault("steps_per_print", 2**31)
    return resolved


def quiet_libraries():
    """Keep the libraries' running commentary out of the progress bar; warnings that matter and errors stay.

    Call it before anything imports DeepSpeed, which looks for its accelerator (and comments on it) when imported.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\..*")
    import deepspeed
    from transformers.utils import logging as transformers_logging

    deepspeed.utils.logger.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()


def start_process_group(launch):
    """Join the job's process group (NCCL on GPU, gloo on CPU) and return this rank's device."""
    import deepspeed

    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        share = max(1, len(os.sched_getaffinity(0)) // launch.local_num_ranks)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", share)))
        # The shared-memory collective is compiled at first use, for minutes, and a build that was killed leaves a lock
        # on which every later start hangs; gloo alone is fast enough on one host. An empty table switches it off.
        deepspeed.ops.__compatible_ops__ = {}
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
    return device


@contextlib.contextmanager
def sharded_loading(ds_config):
    """Within this context transformers loads pretrained weights straight into ZeRO-3 shards (a no-op for other stages)."""
    from transformers.integrations import HfDeepSpeedConfig

    # transformers holds it weakly: it is alive exactly as long as this frame keeps it.
    handle = HfDeepSpeedConfig(ds_config) if zero_stage(ds_config) == 3 else None
    yield handle


@contextlib.contextmanager
def gathered(parameters):
    """Within this context parameters that are sharded are whole on every rank, to be read; every rank must enter it."""
    import deepspeed

    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


def zero_stage(ds_config):
    """ZeRO stage 0 to 3 of a DeepSpeed configuration."""
    return ds_config.get("zero_optimization", {}).get("stage", 0)


class Engine:
    """A model under DeepSpeed on this rank."""

    def __init__(self, model, optimizer, ds_config, launch, device):
        import deepspeed

        self.launch = launch
        self.device = device
        self.ds_config = ds_config
        self._optimizer = optimizer
        # At stage 0 in bf16 DeepSpeed runs the optimizer once to make it create its state: that would decay the weights.
        optimizer.should_skip = lambda: True
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        optimizer.should_skip = self._asked_to_skip
        self._judge, self._is_skipped, self._norm = None, None, float("nan")

    @property
    def model(self):
        """The bare model (its parameters may be sharded)."""
        return self._engine.module

    @property
    def dtype(self):
        """Number format of the forward pass."""
        return torch.bfloat16 if self.ds_config["bf16"]["enabled"] else torch.float32

    def __call__(self, **inputs):
        return self._engine(**inputs)

    def train(self):
        self._engine.train()

    def backward(self, loss):
        """Accumulate gradients of `loss`, whose sum over ranks and micro-steps is the step's loss.

        DeepSpeed averages over ranks, so the loss is scaled up by their number; it does not divide by the micro-steps.
        """
        self._engine.backward(loss * self.launch.num_ranks, scale_wrt_gas=False)

    def step(self, learning_rates, judge=None):
        """End of a micro-step; on the last one of a step the optimizer runs with one learning rate per group.

        `judge(grad_norm)` is given on the last one: where it returns true the optimizer does not run, and weights and
        moments keep every bit. Returns whether the optimizer was kept from running, by `judge` or by DeepSpeed, which
        does so where the norm is not finite.
        """
        for group, rate in zip(self._engine.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        self._judge, self._is_skipped = judge, None
        if judge is not None and zero_stage(self.ds_config) == 0:
            self._norm = self._norm_without_zero()
        self._engine.step()
        if judge is None:
            return False
        if self._is_skipped is None:  # DeepSpeed left the optimizer out
            self._norm = float("nan")
            judge(self._norm)
            return True
        return self._is_skipped

    def _asked_to_skip(self):
        """The optimizer asks this before it runs, once per group of parameters; the answer is found once per step."""
        if self._is_skipped is None and self._judge is not None:
            if zero_stage(self.ds_config) > 0:
                norm = self._engine.optimizer._global_grad_norm  # DeepSpeed's wrapper has it by now, its engine not yet
                self._norm = float("nan") if norm is None or norm < 0 else float(norm)
            self._is_skipped = bool(self._judge(self._norm))
        return bool(self._is_skipped)

    def _norm_without_zero(self):
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def grad_norm(self):
        """Global gradient norm of the last completed step, before clipping; NaN before the first or if not finite."""
        return self._norm

    def slices(self):
        """What this rank holds of every parameter and its optimizer state: a list of `Slice`s, live."""
        return held_slices(self._engine, self._optimizer, self.launch.rank)

    @property
    def num_updates(self):
        """How many times the optimizer has moved the weights."""
        return num_updates(self._optimizer)

    @contextlib.contextmanager
    def loading(self, updates):
        """Within this context `slices()` may be written to; afterwards every rank works with what was written."""
        before_loading(self._engine)
        yield self.slices()
        set_num_updates(self._optimizer, updates)
        publish_weights(self._engine)

    def sum_over_ranks(self, values):
        """Element-wise sum of a 1-D tensor over all ranks."""
        values = values.to(self.device)
        torch.distributed.all_reduce(values)
        return values

    def full_state(self):
        """Full weights by name on rank 0's CPU (an empty dict elsewhere); every rank must call it."""
        import deepspeed

        state = {}
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if self.launch.rank == 0:
                    state[name] = parameter.detach().cpu().clone()
        if self.launch.rank == 0:
            state.update({name: buffer.detach().cpu() for name, buffer in self.model.named_buffers()})
        return state

    def close(self):
        """Free what the engine holds; the process group stays."""
        self._engine.destroy()
