"""Which part of each parameter and of its optimizer state this rank holds, for every ZeRO stage, as plain tensors.

Everything that reads or writes a checkpoint goes through here, so that the format knows nothing of DeepSpeed: a parameter
is a flat run of elements, of which a rank holds [start, start + length). ZeRO-3 cuts every parameter evenly over the
ranks; stages 1 and 2 cut the optimizer's flat groups, so a rank holds whole parameters and a piece at either end; at stage
0, and for frozen parameters below stage 3, every rank holds everything.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Moments of a trained parameter, unless it says otherwise itself (`parameter.moments`)."""
AVERAGE = "average"
"""The average of a trained weight over the steps, where one is kept."""
MAX_SHARERS = 16
"""Ranks over which the saving of what all of them hold is shared out, at most: so many files must be read to have it again."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What this rank holds of one parameter.

    tensors: {"weight" and, if trained, its moments and "average" where there is one: 1-D live view of the elements from `start`
    on}. The weight is the fp32 master where there is one. is_shared: every rank holds the same elements, so some of them save a
    share each. is_block: every rank holds one of equal blocks (rounded up), this one the block of its number.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, torch.Tensor]
    is_shared: bool
    is_block: bool = False

    def share(self, rank: int, num_ranks: int) -> tuple[int, dict[str, torch.Tensor]]:
        """(start, tensors) of what this rank saves: all of it, or an even part of what all ranks hold (or nothing)."""
        if not self.is_shared:
            return self.start, self.tensors
        length, num_sharers = self.tensors[WEIGHT].numel(), min(num_ranks, MAX_SHARERS)
        begin, end = (length * min(number, num_sharers) // num_sharers for number in (rank, rank + 1))
        return self.start + begin, {kind: tensor[begin:end] for kind, tensor in self.tensors.items()}

    def place(self, rank: int, num_ranks: int) -> str | int | list[list[int]]:
        """Where the parameter lies over all ranks' files, as far as this rank can say (see `checkpoint.places`)."""
        if self.is_shared:
            return min(num_ranks, MAX_SHARERS)
        return "blocks" if self.is_block else [[rank, self.start, self.tensors[WEIGHT].numel()]]


def held_slices(
    engine: "DeepSpeedEngine", optimizer: torch.optim.Optimizer, rank: int, with_average: bool = False
) -> list[Slice]:
    """The `Slice`s of every parameter of which this rank holds a part, by name.

    Optimizer state that does not exist before the first step is created as zeros, as the first step would, and an average as
    the weights.
    """
    find = _finder(engine.optimizer, optimizer)
    found: list[Slice] = []
    for name, parameter in engine.module.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        part = find(parameter, rank) if parameter.requires_grad else _frozen_part(parameter, rank)
        if part is not None:
            if with_average and AVERAGE not in part.state and parameter.requires_grad:
                part.state[AVERAGE] = part.flat.detach().clone()
            found += part.slices(name, shape)
    return found


def places_in(
    engine: "DeepSpeedEngine",
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    flat: torch.Tensor,
    rank: int,
) -> list[tuple[torch.Size, slice, slice]]:
    """(shape, this rank's stretch of the parameter, where it lies in `flat`) of those `parameters` that `flat` is cut from.

    `flat` is what DeepSpeed (stages 1 to 3) gives an optimizer. Where this rank has nothing of one, both are empty: the
    list is as long on every rank, in one order.
    """
    find, found = _finder(engine.optimizer, optimizer), []
    for parameter in parameters:
        part, shape = find(parameter, rank), torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        if part is None or part.flat is flat:
            start, offset = (part.start, part.offset) if part else (0, 0)
            length = max(0, min(part.length, shape.numel() - start)) if part else 0
            found.append((shape, slice(start, start + length), slice(offset, offset + length)))
    return found


def _finder(wrapper: Any, optimizer: torch.optim.Optimizer) -> "Callable[[torch.nn.Parameter, int], _Part | None]":
    """(parameter, rank) -> where DeepSpeed's wrapper keeps a trained parameter: a `_Part`, or None."""
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return functools.partial(_stage3_part, wrapper, optimizer)
    if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state") or hasattr(wrapper, "bf16_groups"):
        return functools.partial(_mapped_part, wrapper, optimizer)
    return functools.partial(_whole_part, _masters_of_bf16_without_zero(wrapper), optimizer)


@dataclass(frozen=True)
class _Part:
    """A stretch of a flat tensor that holds elements `start` and on of a parameter, and the moments of that tensor.

    state: {kind: moment}, each as long as `flat`; empty where the parameter is frozen.
    """

    flat: torch.Tensor
    offset: int
    length: int
    start: int
    state: dict[str, torch.Tensor]
    is_shared: bool = False
    is_block: bool = False

    def slices(self, name: str, shape: tuple[int, ...]) -> list[Slice]:
        """The slice, without the padding at the end; none where nothing is left."""
        length = max(0, min(self.length, torch.Size(shape).numel() - self.start))
        if not length and not self.is_shared:
            return []
        kinds = [kind for kind in (*MOMENTS, AVERAGE) if kind in self.state]
        sources = {WEIGHT: self.flat.data, **{kind: self.state[kind] for kind in kinds}}
        tensors = {kind: source.view(-1).narrow(0, self.offset, length) for kind, source in sources.items()}
        cut = {"is_shared": self.is_shared, "is_block": self.is_block}
        return [Slice(name=name, shape=shape, start=self.start, tensors=tensors, **cut)]


def publish_weights(engine: "DeepSpeedEngine") -> None:
    """After weights were written into `held_slices`: bring the forward pass' copies up to date on every rank."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        for group in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        wrapper.checkpoint_event_epilogue()  # gathers the small parameters that every rank keeps whole
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    else:
        for parameter, master in _masters_of_bf16_without_zero(wrapper).items():
            parameter.data.copy_(master.data)


def before_loading(engine: "DeepSpeedEngine") -> None:
    """Give up gathered parameters, so that what is written into a partition is what a later gather finds."""
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()


def num_updates(optimizer: torch.optim.Optimizer) -> int:
    """How many times the optimizer has moved the weights; skipped steps do not count."""
    counts = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(counts) <= 1, f"parameter groups were updated {sorted(counts)} times; all are stepped together"
    return max(counts, default=0)


def set_num_updates(optimizer: torch.optim.Optimizer, number: int) -> None:
    """Undo or redo the optimizer's count, on which its bias correction depends."""
    for state in optimizer.state.values():
        state["step"] = torch.as_tensor(float(number), dtype=torch.float32, device=state["step"].device)


def _stage3_part(wrapper: Any, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, rank: int) -> _Part:
    group, offset, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
    flat = wrapper.fp32_partitioned_groups_flat[group]
    return _Part(flat, offset, length, length * rank, _state_of(optimizer, flat, parameter), is_block=True)


def _mapped_part(wrapper: Any, optimizer: torch.optim.Optimizer, parameter: Any, rank: int) -> _Part | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # none of it is in this rank's partition
        return None
    flats = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition
    flat, address = flats[mapping.param_group_index], mapping.hp_fragment_address
    start = mapping.lp_fragment_address.start
    return _Part(flat, address.start, address.numel, start, _state_of(optimizer, flat, parameter))


def _whole_part(
    masters: dict[torch.Tensor, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    parameter: torch.nn.Parameter,
    rank: int,
) -> _Part:
    master = masters.get(parameter, parameter)
    return _Part(master, 0, master.numel(), 0, _state_of(optimizer, master, parameter), is_shared=True)


def _frozen_part(parameter: Any, rank: int) -> _Part:
    if not hasattr(parameter, "ds_tensor"):
        return _Part(parameter, 0, parameter.numel(), 0, {}, is_shared=True)
    flat = parameter.ds_tensor.data.view(-1)
    return _Part(flat, 0, flat.numel(), flat.numel() * rank, {}, is_block=True)


def _state_of(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, parameter: Any) -> dict[str, torch.Tensor]:
    state = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        state.update(
            {kind: torch.zeros_like(tensor, requires_grad=False) for kind in getattr(parameter, "moments", MOMENTS)}
        )
    return state


def _masters_of_bf16_without_zero(wrapper: Any) -> dict[torch.Tensor, torch.Tensor]:
    """{bf16 parameter: fp32 master} of DeepSpeed's wrapper for stage 0, else empty."""
    if not hasattr(wrapper, "fp32_groups") or not hasattr(wrapper, "fp16_groups"):
        return {}
    pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups)
    return {parameter: master for group in pairs for parameter, master in zip(*group)}
