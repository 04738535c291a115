"""Bytes on each GPU by cause, at every ZeRO stage, from the numbers of parameters and DeepSpeed's own settings.

What DeepSpeed 0.19 keeps: checked by `tests/estimate/` against real runs at stages 0, 2 and 3. P is all parameters, T the
trained ones, N the ranks, b the bytes of a weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..model import TokenFlexForConditionalGeneration
from ..train.optimizer import PARTS

MASTER, MOMENTS, AVERAGE = 4, 8, 4
"""Bytes per trained parameter, in fp32."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """Parameters of one part of the model, and how many of them are trained."""

    parameters: int
    trained: int


def part_sizes(model: TokenFlexForConditionalGeneration) -> dict[str, PartSize]:
    """`PartSize` by part; a tied weight counts once."""
    sizes = {}
    for part, prefix in PARTS.items():
        its = [p for name, p in model.named_parameters() if name.startswith(prefix)]
        sizes[part] = PartSize(
            parameters=sum(p.numel() for p in its), trained=sum(p.numel() for p in its if p.requires_grad)
        )
    return sizes


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What memory depends on. num_bytes: of all weights. largest: parameters of the largest single weight. small: in weights below the
    stage 3 threshold, which every rank keeps whole. itemsize: bytes of a weight that is not in 8 bit."""

    total: int
    num_bytes: int
    trained: int
    largest: int
    small: int
    itemsize: int

    @classmethod
    def of(cls, model: TokenFlexForConditionalGeneration, ds_config: Mapping[str, Any]) -> "ModelSizes":
        """Of a model, under a DeepSpeed configuration."""
        threshold = _zero(ds_config).get("stage3_param_persistence_threshold", 100_000)
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        return cls(
            total=sum(size for size, _ in sizes),
            num_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            trained=sum(size for size, trained in sizes if trained),
            largest=max(size for size, _ in sizes),
            small=sum(size for size, _ in sizes if size < threshold),
            itemsize=model.dtype.itemsize,
        )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU by cause, at a ZeRO stage.

    master: fp32 copies of 16-bit or sharded weights. average: of the weights (`train.ema_decay`). gathered: whole weights that stage 3 has collected. activations: all that a
    forward and backward pass of the worst micro-batch holds but its logits. buffers: DeepSpeed's for communication. update:
    what the optimizer's step makes besides, once activations are gone. host: on the machine's memory, where it is offloaded.
    """

    stage: int
    weights: float
    gradients: float
    master: float
    moments: float
    average: float
    gathered: float
    buffers: float
    activations: float = 0.0
    logits: float = 0.0
    reserved: float = 0.0
    update: float = 0.0
    host: float = 0.0

    @property
    def states(self) -> float:
        """Weights, gradients, masters, moments and average: what is there all the time."""
        return self.weights + self.gradients + self.master + self.moments + self.average

    @property
    def total(self) -> float:
        """The most at any time, in bytes."""
        at_work = self.gathered + self.activations + self.logits
        return self.states + self.buffers + self.reserved + max(at_work, self.update)

    def by_cause(self) -> dict[str, float]:
        """Every figure by its name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "stage"}


def stage_memory(
    sizes: ModelSizes,
    ds_config: Mapping[str, Any],
    stage: int,
    num_ranks: int,
    held: Mapping[str, float] | None = None,
    *,
    with_average: bool = False,
) -> Memory:
    """`Memory` at a ZeRO stage over so many ranks; `held` has activations, logits and what is reserved, in bytes.

    with_average: an average of the trained weights is kept.

    Everything but the stage is as the DeepSpeed configuration says: buckets, live parameters, offload.
    """
    zero, b = _zero(ds_config), sizes.itemsize
    share = {0: 1, 1: num_ranks, 2: num_ranks, 3: num_ranks}[stage]
    has_master = stage > 0 or b == 2  # stages 1 to 3 copy their share of the weights, fp32 or not
    numbers: dict[str, float] = {
        "weights": sizes.num_bytes / num_ranks + b * sizes.small if stage == 3 else sizes.num_bytes,
        "gradients": b * sizes.trained / (num_ranks if stage > 1 else 1),
        "master": has_master * MASTER * sizes.trained / share,
        "moments": MOMENTS * sizes.trained / share,
        "average": with_average * AVERAGE * sizes.trained / share,
        "gathered": b * _gathered(sizes, zero) if stage == 3 and num_ranks > 1 else 0.0,
        "buffers": b * _bucket(zero, sizes) * _num_buckets(zero, stage),
        "update": (4 if stage or b == 2 else 0) * sizes.trained / share,
        "host": 0.0,
    }
    for name in _offloaded(zero, stage):
        numbers["host"] += numbers[name]
        numbers[name] = 0.0
    return Memory(stage=stage, **numbers, **(held or {}))


def checkpoint_bytes(sizes: ModelSizes, *, with_average: bool = False) -> float:
    """Of a checkpoint: masters, moments and average of what is trained, the weights of what is not."""
    trained = MASTER + MOMENTS + with_average * AVERAGE
    return trained * sizes.trained + sizes.num_bytes - sizes.itemsize * sizes.trained


def _zero(ds_config: Mapping[str, Any]) -> Mapping[str, Any]:
    return ds_config.get("zero_optimization", {})


def _gathered(sizes: ModelSizes, zero: Mapping[str, Any]) -> float:
    """Parameters that stage 3 holds whole at most: what may stay alive, and the largest weight, which comes when it must."""
    alive = zero.get("stage3_max_live_parameters", 1_000_000_000)
    return min(sizes.total - sizes.small, alive + sizes.largest)


def _bucket(zero: Mapping[str, Any], sizes: ModelSizes) -> float:
    """Elements of a bucket that gradients are reduced in."""
    return float(zero.get("reduce_bucket_size", 500_000_000))


def _num_buckets(zero: Mapping[str, Any], stage: int) -> int:
    if stage == 0 or not zero.get("contiguous_gradients", True):
        return 0
    return 2 if stage < 3 and zero.get("overlap_comm", False) else 1


def _offloaded(zero: Mapping[str, Any], stage: int) -> list[str]:
    """Causes that DeepSpeed keeps in the machine's memory (or on its disk) instead."""

    def is_off(key: str) -> bool:
        return (zero.get(key) or {}).get("device", "none") in ("cpu", "nvme")

    names = ["master", "moments", "average", "gradients", "update"] if stage and is_off("offload_optimizer") else []
    return names + (["weights"] if stage == 3 and is_off("offload_param") else [])
