"""Which part of each parameter and of its optimizer state this rank holds, for every ZeRO stage, as plain tensors.

Everything that reads or writes a checkpoint goes through here, so that the format knows nothing of DeepSpeed: a parameter
is a flat run of elements, of which a rank holds [start, start + length). ZeRO-3 cuts every parameter evenly over the
ranks; stages 1 and 2 cut the optimizer's flat groups, so a rank holds whole parameters and a piece at either end; at stage
0, and for frozen parameters below stage 3, every rank holds everything.
"""

from dataclasses import dataclass

import torch

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What this rank holds of one parameter.

    tensors: {"weight" and, if trained, "exp_avg" and "exp_avg_sq": 1-D live view of the elements from `start` on}. The
    weight is the fp32 master where there is one. is_shared: every rank holds the same elements, so each saves its share.
    """

    name: str
    shape: tuple
    start: int
    tensors: dict
    is_shared: bool

    def share(self, rank, num_ranks):
        """(start, tensors) of what this rank saves: all of it, or an even part of what all ranks hold."""
        if not self.is_shared:
            return self.start, self.tensors
        length = self.tensors[WEIGHT].numel()
        begin, end = length * rank // num_ranks, length * (rank + 1) // num_ranks
        return self.start + begin, {kind: tensor[begin:end] for kind, tensor in self.tensors.items()}


def held_slices(engine, optimizer, rank):
    """The `Slice`s of every parameter of which this rank holds a part, by name; `engine` is DeepSpeed's.

    Optimizer state that does not exist before the first step is created as zeros, as the first step would.
    """
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        place = _stage3_place
    elif hasattr(wrapper, "_lazy_init_hp_params_optimizer_state") or hasattr(wrapper, "bf16_groups"):
        place = _mapped_place
    else:
        place = _whole_place
    masters = _masters_of_bf16_without_zero(wrapper)
    found = []
    for name, parameter in engine.module.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if parameter.requires_grad:
            found += place(wrapper, optimizer, masters, name, shape, parameter, rank)
        elif hasattr(parameter, "ds_tensor"):
            found += _stage3_frozen(name, shape, parameter, rank)
        else:
            view = parameter.data.view(-1)
            found.append(Slice(name=name, shape=shape, start=0, tensors={WEIGHT: view}, is_shared=True))
    return found


def publish_weights(engine):
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


def before_loading(engine):
    """Give up gathered parameters, so that what is written into a partition is what a later gather finds."""
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()


def num_updates(optimizer):
    """How many times the optimizer has moved the weights; skipped steps do not count."""
    counts = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(counts) <= 1, f"parameter groups were updated {sorted(counts)} times; all are stepped together"
    return max(counts, default=0)


def set_num_updates(optimizer, number):
    """Undo or redo the optimizer's count, on which its bias correction depends."""
    for state in optimizer.state.values():
        state["step"] = torch.as_tensor(float(number), dtype=torch.float32, device=state["step"].device)


def _stage3_place(wrapper, optimizer, masters, name, shape, parameter, rank):
    group, offset, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
    flat = wrapper.fp32_partitioned_groups_flat[group]
    return _cut(name, shape, length * rank, flat, offset, length, _state_of(optimizer, flat))


def _stage3_frozen(name, shape, parameter, rank):
    view = parameter.ds_tensor.data.view(-1)
    return _cut(name, shape, view.numel() * rank, view, 0, view.numel(), {})


def _mapped_place(wrapper, optimizer, masters, name, shape, parameter, rank):
    mapping = parameter._hp_mapping
    if mapping is None:  # none of it is in this rank's partition
        return []
    group = mapping.param_group_index
    flats = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition
    address, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
    return _cut(
        name, shape, start, flats[group], address.start, address.numel, _state_of(optimizer, flats[group])
    )  # fmt: skip


def _whole_place(wrapper, optimizer, masters, name, shape, parameter, rank):
    master = masters.get(parameter, parameter)
    state = _state_of(optimizer, master)
    tensors = {WEIGHT: master.data.view(-1), **{kind: state[kind].view(-1) for kind in MOMENTS}}
    return [Slice(name=name, shape=shape, start=0, tensors=tensors, is_shared=True)]


def _cut(name, shape, start, flat, offset, length, state):
    """The part of `flat` that is this parameter's, without the padding at its end."""
    length = max(0, min(length, torch.Size(shape).numel() - start))
    if not length:
        return []
    sources = {WEIGHT: flat.data, **{kind: state[kind] for kind in MOMENTS if state}}
    tensors = {kind: source.narrow(0, offset, length) for kind, source in sources.items()}
    return [Slice(name=name, shape=shape, start=start, tensors=tensors, is_shared=False)]


def _state_of(optimizer, tensor):
    state = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        state.update({kind: torch.zeros_like(tensor, requires_grad=False) for kind in MOMENTS})
    return state


def _masters_of_bf16_without_zero(wrapper):
    """{bf16 parameter: fp32 master} of DeepSpeed's wrapper for stage 0, else empty."""
    if not hasattr(wrapper, "fp32_groups") or not hasattr(wrapper, "fp16_groups"):
        return {}
    pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups)
    return {parameter: master for group in pairs for parameter, master in zip(*group)}
