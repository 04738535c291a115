"""What a run will need and how long it will take, from its recipe alone: `estimate` is the whole way.

Nothing is measured here. Shapes are exact, what a plan draws is planned, and what can only be assumed (how fast GPUs and disks
are) is an argument with a name.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config import RunConfig
from ..data.loader import num_micro_steps
from ..errors import UserError
from ..model import TokenFlexForConditionalGeneration
from ..model.build import recompute_activations, shaped_model, tokenizer_size
from ..model.int8 import SCALE
from ..parallel import zero_stage
from ..train.loss import fused_loss_head
from ..train.optimizer import ADAPTER, parameter_groups
from .gpus import Gpu
from .memory import Memory, ModelSizes, PartSize, checkpoint_bytes, part_sizes, stage_memory
from .trace import PackShape, Passes, activation_bytes, logits_bytes, unit_costs
from .workload import Workload

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What cannot be known from a recipe.

    mfu: share of the GPU's peak that model FLOPs reach. write_gb_s: all ranks together, to the checkpoints' disk. reserved_gb:
    of a GPU's memory, for CUDA, NCCL and the allocator's gaps.
    """

    mfu: float = 0.35
    write_gb_s: float = 2.0
    reserved_gb: float = 3.0


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of the worst micro-batch's forward and backward pass: kept as they are, or recomputed; and of its logits."""

    kept: int
    recomputed: int
    logits: int
    is_loss_fused: bool


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `estimate` found; sizes in bytes, times in seconds, FLOPs of a whole step over all ranks.

    flops: by cause. micro_batch: the worst one. memory: at every stage, as the recipe sets recomputation.
    """

    name: str
    num_gpus: int
    gpu: Gpu
    precision: str
    stage: int
    recomputes: bool
    parts: dict[str, PartSize]
    workload: Workload
    num_micro_steps: int
    num_steps: int
    micro_batch: PackShape
    activations: Activations
    memory: tuple[Memory, ...]
    flops: dict[str, Passes]
    checkpoint_bytes: float
    export_bytes: float
    assumptions: Assumptions
    notes: tuple[str, ...]

    @property
    def step_flops(self) -> float:
        """Model FLOPs of a step: forward and backward, recomputation not counted."""
        return sum(passes.total for passes in self.flops.values())

    @property
    def step_s(self) -> float:
        """Seconds of a step at the assumed utilisation."""
        return self.step_flops / (self.num_gpus * self.gpu.flops * self.assumptions.mfu)

    @property
    def run_s(self) -> float:
        """Seconds of all steps, without start, checkpoints and evaluation."""
        return self.step_s * self.num_steps

    @property
    def checkpoint_s(self) -> float:
        """Seconds until a checkpoint is written."""
        return self.checkpoint_bytes / (self.assumptions.write_gb_s * 1e9)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: every field and every time."""
        times = {name: getattr(self, name) for name in ("step_flops", "step_s", "run_s", "checkpoint_s")}
        totals = [{**asdict(memory), "total": memory.total} for memory in self.memory]
        return {**asdict(self), **times, "memory": totals}


def estimate(
    config: RunConfig,
    ds_config: Mapping[str, Any],
    workload: Workload,
    *,
    num_gpus: int,
    gpu: Gpu,
    precision: str = "bf16",
    assumptions: Assumptions | None = None,
) -> Estimate:
    """The `Estimate` of a recipe on so many GPUs; loads no weight, needs no GPU, takes seconds.

    Args: config: with `embedded` replaced. ds_config: as `parallel.load_ds_config` gives it. workload: from `workload_of`.

    Raises:
        UserError: a part whose configuration is not at hand, or GPUs that cannot share the packs of a step.
    """
    assumptions = assumptions or Assumptions()
    micro_steps = num_micro_steps(config.data.packs_per_step, num_gpus, config.data.packs_per_micro_batch)
    model = shaped_model(config.model, config.budget, torch.bfloat16 if precision == "bf16" else torch.float32)
    parameter_groups(model, config.optimizer)  # freezes what the recipe freezes
    pack = workload.worst.times(config.data.packs_per_step // num_gpus // micro_steps)
    costs = _traced(config, lambda: unit_costs(model))
    activations = _traced(config, lambda: trace_activations(config, model, pack))
    sizes = ModelSizes.of(model, ds_config)
    held = {"logits": float(activations.logits), "reserved": assumptions.reserved_gb * 1e9}
    held["activations"] = float(activations.recomputed if config.model.gradient_checkpointing else activations.kept)
    average = {"with_average": config.train.ema_decay > 0}
    work = {name: value for name, value in asdict(workload.step).items() if name != "samples"}
    return Estimate(
        name=config.name,
        num_gpus=num_gpus,
        gpu=gpu,
        precision=precision,
        stage=zero_stage(dict(ds_config)),
        recomputes=config.model.gradient_checkpointing,
        parts=part_sizes(model),
        workload=workload,
        num_micro_steps=micro_steps,
        num_steps=config.train.num_steps,
        micro_batch=pack,
        activations=activations,
        memory=tuple(stage_memory(sizes, ds_config, stage, num_gpus, held, **average) for stage in STAGES),
        flops=costs.of(**work),
        checkpoint_bytes=checkpoint_bytes(sizes, **average),
        export_bytes=sizes.itemsize * (sizes.total - _size_of_additions(model)),
        assumptions=assumptions,
        notes=tuple(_notes(config)),
    )


def trace_activations(config: RunConfig, model: TokenFlexForConditionalGeneration, pack: PackShape) -> Activations:
    """`Activations` of a micro-batch in a model on the meta device; it is left recomputing."""
    model.train()
    kept = activation_bytes(model, pack)
    recomputed = kept
    if model.supports_gradient_checkpointing:
        recompute_activations(model)
        recomputed = activation_bytes(model, pack)
    is_fused = fused_loss_head(model.language_model, config.train.fused_loss, torch.device("cuda")) is not None
    logits = logits_bytes(model, pack.learned, is_fused)
    return Activations(kept=kept, recomputed=recomputed, logits=logits, is_loss_fused=is_fused)


def _traced(config: RunConfig, run: Callable[[], Any]) -> Any:
    """What a run on shapes gives.

    Raises:
        UserError: the model reads values where there are only shapes.
    """
    try:
        return run()
    except (RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"estimate of {config.name}: a part cannot be run on shapes alone, as one whose experts are chosen by values ({reason}); "
            "measure it instead: launch/train.py --dry-run"
        ) from error


def _size_of_additions(model):
    """Parameters of adapters and scales of rows, which an export has merged into what they stand beside."""
    return sum(p.numel() for name, p in model.named_parameters() if ADAPTER in name or name.endswith(SCALE))


def _notes(config):
    if not tokenizer_size(config.model):
        yield "the tokenizer is not at hand: the vocabulary is the language model's, without tokens that would be added"
    if config.model.liger != "off" or config.model.projector_backend != "reference":
        yield "activations are those of plain torch: fused kernels (Liger, the projector's) hold less"
