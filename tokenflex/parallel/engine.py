"""The one place that knows DeepSpeed: configuration, sharded model set-up, backward, step, and the slices of a checkpoint."""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .environment import Launch
from .ranks import Ranks
from .slices import (
    AVERAGE,
    WEIGHT,
    Slice,
    before_loading,
    held_slices,
    num_updates,
    places_in,
    publish_weights,
    set_num_updates,
)
from .stopwatch import Stopwatch

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


def load_ds_config(path: str | PathLike) -> dict[str, Any]:
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
    if config.get("sequence_parallel_size", 1) != 1:
        raise UserError(
            f"--ds_config {path}: sets sequence_parallel_size; there is no sequence parallelism here, a pack lies whole on one rank: leave "
            "it out"
        )
    for key, ours in OURS.items():
        if config.get(key, "auto") != "auto":
            raise UserError(f"--ds_config {path}: sets {key}; leave it out (or 'auto') and set {ours} instead")
    return config


def resolve_ds_config(
    config: dict[str, Any], precision: str, num_micro_steps: int, max_grad_norm: float
) -> dict[str, Any]:
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
    # With an offloaded optimizer DeepSpeed asks for its own Adam; ours runs on the CPU as well, and can be vetoed.
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    return resolved


def quiet_libraries() -> None:
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


def join_ranks(launch: Launch) -> Ranks:
    """Join the job's process group (NCCL on GPU, gloo on CPU); returns the job's ranks, with this rank's device.

    Raises:
        UserError: the meeting point cannot be reached, or its port is taken.
    """
    import deepspeed

    from . import bends

    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        share = max(1, len(os.sched_getaffinity(0)) // launch.local_num_ranks)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", share)))
        bends.without_shared_memory_collective()
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
        except torch.distributed.DistNetworkError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"rank {launch.rank}: cannot meet the other ranks at {launch.master_addr}:{launch.master_port} ({reason}); where "
                "another job has taken the port, set MASTER_PORT (deepspeed --master_port, torchrun --master-port) to a free one"
            ) from None
    return Ranks(launch, device)


@contextlib.contextmanager
def sharded_loading(ds_config: dict[str, Any]) -> Iterator[object]:
    """Within this context transformers loads pretrained weights straight into ZeRO-3 shards (a no-op for other stages)."""
    from transformers.integrations import HfDeepSpeedConfig

    # transformers holds it weakly: it is alive exactly as long as this frame keeps it.
    handle = HfDeepSpeedConfig(ds_config) if zero_stage(ds_config) == 3 else None
    yield handle


@contextlib.contextmanager
def gathered(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Within this context parameters that are sharded are whole on every rank, to be read; every rank must enter it."""
    import deepspeed

    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


def zero_stage(ds_config: dict[str, Any]) -> int:
    """ZeRO stage 0 to 3 of a DeepSpeed configuration."""
    return ds_config.get("zero_optimization", {}).get("stage", 0)


@dataclass(frozen=True)
class Update:
    """How the update of an optimizer step ended.

    grad_norm: global norm of the gradients before clipping, NaN where it is not finite. vetoed: why the weights did not
    move, in words; empty where they did. beside: what was read from the device with the norm.
    """

    grad_norm: float
    vetoed: str = ""
    beside: tuple[float, ...] = ()


class Engine:
    """A model under DeepSpeed on this rank.

    Args:
        model: its weights may be sharded already.
        make_optimizer: (should_skip, map_matrices) -> an optimizer that, before it moves anything, asks `should_skip()` whether
            to; what needs whole matrices has them by `map_matrices` (see the method).
        ds_config: from `resolve_ds_config`.
        ranks: the job.
        with_average: keep an average of the trained weights (`update_average`), which `slices` have and checkpoints with them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        make_optimizer: Callable[[Callable[[], bool], Callable[..., None]], torch.optim.Optimizer],
        ds_config: dict[str, Any],
        ranks: Ranks,
        with_average: bool = False,
    ):
        import deepspeed

        from . import bends

        self._bends = bends
        self.with_average = with_average
        self.ranks, self.device, self.ds_config = ranks, ranks.device, ds_config
        self.stopwatch = Stopwatch(ranks.device)
        """Of this rank's passes, from a forward to the end of its backward."""
        # At stage 0 in bf16 DeepSpeed runs the optimizer once to make it create its state: that would decay the weights.
        self._is_ready = False
        self._veto: Callable[..., str] | None = None
        self._beside: Sequence[torch.Tensor] = ()
        self._read: tuple[float, ...] = ()
        self._answer: str | None = None
        self._norm = float("nan")
        self._optimizer = make_optimizer(self._should_skip, self.map_matrices)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=ds_config)
        self._is_ready = True

    @property
    def model(self) -> torch.nn.Module:
        """The bare model (its parameters may be sharded)."""
        return self._engine.module

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the forward pass."""
        return torch.bfloat16 if self.ds_config["bf16"]["enabled"] else torch.float32

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward pass."""
        self.stopwatch.start()
        return self._engine(**inputs)

    def train(self) -> None:
        """Put the model into training mode."""
        self._engine.train()

    def eval(self) -> None:
        """Put the model into evaluation mode."""
        self._engine.eval()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of `loss`, whose sum over ranks and micro-steps is the step's loss.

        DeepSpeed averages over ranks, so the loss is scaled up by their number; it does not divide by the micro-steps.
        """
        self._engine.backward(loss * self.ranks.num_ranks, scale_wrt_gas=False)
        self.stopwatch.stop()

    def step(
        self,
        learning_rates: Sequence[float],
        veto: Callable[..., str] | None = None,
        beside: Sequence[torch.Tensor] = (),
    ) -> Update:
        """End of a micro-step; on the last one of a step the optimizer runs with one learning rate per group.

        `veto(grad_norm, *beside)` is given on the last one: where it answers with a reason the optimizer does not run, and
        weights and moments keep every bit. The norm and the scalars `beside` it are read from the device together: the one time
        that a step waits for it. DeepSpeed itself leaves the optimizer out where the norm is not finite; `veto` is then asked
        about NaN.
        """
        for group, rate in zip(self._engine.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        self._veto, self._answer, self._beside = veto, None, beside
        if veto is not None and zero_stage(self.ds_config) == 0:
            self._norm_on_device = self._bends.grad_norm_without_zero(self.model)
        self._engine.step()
        if veto is None:
            return Update(self._norm)
        if self._answer is None:  # DeepSpeed left the optimizer out
            self._ask(torch.tensor(float("nan")))
        return Update(self._norm, self._answer or "", self._read)

    def _should_skip(self) -> bool:
        """The optimizer asks this before it runs, once per group of parameters; the answer is found once per step."""
        if not self._is_ready:
            return True
        if self._answer is None and self._veto is not None:
            if zero_stage(self.ds_config) > 0:
                self._norm_on_device = self._bends.grad_norm_before_update(self._engine)
            self._ask(self._norm_on_device)
        return bool(self._answer)

    def _ask(self, norm: torch.Tensor) -> None:
        """Read the norm and what goes beside it in one go, and ask the veto."""
        device = self._beside[0].device if self._beside else norm.device
        scalars = torch.stack([x.detach().double().to(device).view(()) for x in (norm, *self._beside)])
        self._norm, *read = scalars.tolist()
        self._norm = float("nan") if self._norm < 0 else self._norm
        self._read = tuple(read)
        assert self._veto is not None
        self._answer = self._veto(self._norm, *read)

    def slices(self) -> list[Slice]:
        """What this rank holds of every parameter and its optimizer state: a list of `Slice`s, live."""
        return held_slices(self._engine, self._optimizer, self.ranks.rank, self.with_average)

    def map_matrices(
        self,
        parameters: Sequence[torch.nn.Parameter],
        flat: torch.Tensor,
        values: torch.Tensor,
        function: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """In place: `function(matrix)` for each matrix of `values`, laid out as `flat`, the weights that an optimizer is given.

        parameters: of its group. Below stage 1 an optimizer has matrices; above, a rank has stretches of them. Each is put
        together on one rank, in turn, so the work is shared out; every rank must call it for the same weights in one order.
        """
        if zero_stage(self.ds_config) == 0:
            values.copy_(function(values))
            return
        places, num_ranks = (
            places_in(self._engine, self._optimizer, parameters, flat, self.ranks.rank),
            self.ranks.num_ranks,
        )
        for begin in range(0, len(places), num_ranks):
            several, mine = list(enumerate(places[begin : begin + num_ranks])), torch.empty(0)
            for owner, (shape, there, here) in several:
                whole = torch.zeros(shape, dtype=values.dtype, device=self.device)
                whole.view(-1)[there] = values[here].to(self.device)
                torch.distributed.reduce(whole, owner)
                mine = function(whole).contiguous() if owner == self.ranks.rank else mine
            for owner, (shape, there, here) in several:
                is_mine = owner == self.ranks.rank
                whole = mine if is_mine else torch.empty(shape, dtype=values.dtype, device=self.device)
                torch.distributed.broadcast(whole, owner)
                values[here] = whole.view(-1)[there].to(values.device)

    def update_average(self, decay: float) -> None:
        """Move the average of the trained weights towards them: average = decay x average + (1 - decay) x weights."""
        for weight, state in self._optimizer.state.items():
            if AVERAGE in state:
                state[AVERAGE].lerp_(weight.detach(), 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the model's trained weights are their average; every rank must enter it."""
        self._exchange_average()
        try:
            yield
        finally:
            self._exchange_average()

    def _exchange_average(self):
        before_loading(self._engine)
        for piece in self.slices():
            if AVERAGE in piece.tensors:
                weight = piece.tensors[WEIGHT].clone()
                piece.tensors[WEIGHT].copy_(piece.tensors[AVERAGE])
                piece.tensors[AVERAGE].copy_(weight)
        publish_weights(self._engine)

    @property
    def num_updates(self) -> int:
        """How many times the optimizer has moved the weights."""
        return num_updates(self._optimizer)

    @contextlib.contextmanager
    def loading(self, updates: int) -> Iterator[list[Slice]]:
        """Within this context `slices()` may be written to; afterwards every rank works with what was written."""
        before_loading(self._engine)
        yield self.slices()
        set_num_updates(self._optimizer, updates)
        publish_weights(self._engine)

    def full_state(self) -> dict[str, torch.Tensor]:
        """Full weights by name on rank 0's CPU (an empty dict elsewhere); every rank must call it."""
        import deepspeed

        state: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if self.ranks.rank == 0:
                    state[name] = parameter.detach().cpu().clone()
        if self.ranks.rank == 0:
            state.update({name: buffer.detach().cpu() for name, buffer in self.model.named_buffers()})
        return state

    def close(self) -> None:
        """Free what the engine holds; the process group stays."""
        self._engine.destroy()
