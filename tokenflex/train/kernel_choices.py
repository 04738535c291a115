"""Which configuration of every kernel a run uses: chosen once, by rank 0, and kept with the run.

Two processes may time the same kernels differently, and another configuration sums in another order. A run that goes on
equal to the bit therefore stores what was chosen and takes it up again, whatever the device's clocks say that day.
"""

from collections.abc import Sequence

import torch

from ..model import TokenFlexForConditionalGeneration
from ..model.pooling import sides_of
from ..parallel import Ranks

Choices = dict[str, dict]
"""As plain JSON values."""


def shapes_of(counts: Sequence[int], max_tiles: int) -> list[list[int]]:
    """Batches that stand for all of a run: tiles of one count, 1, 2, 4, ... up to `max_tiles` of them.

    Returns a list of lists of visual-token counts, one per tile.
    """
    numbers = [2**power for power in range(max(max_tiles - 1, 0).bit_length() + 1)]
    return [[count] * min(number, max_tiles) for count in sorted(set(counts)) for number in numbers]


def settle(
    model: TokenFlexForConditionalGeneration, shapes: Sequence[Sequence[int]], ranks: Ranks, saved: Choices | None
) -> Choices | None:
    """Make or take up the choices of the projector's kernels, before the first step; collective.

    Args:
        model: `TokenFlexForConditionalGeneration` on its device, under any ZeRO stage.
        shapes: lists of visual-token counts, one per tile of a batch (`shapes_of`).
        ranks: `parallel.Ranks`; rank 0 times, the others wait and take its choices.
        saved: what this returned when the run began, out of its checkpoint; None in a new run.

    Returns:
        The choices as plain JSON data, to be stored in every checkpoint; None where no kernel runs (CPU, `reference`).

    From here on the process times nothing: a shape that was not settled takes the first right configuration.
    """
    projector = model.projector
    weight = next(projector.parameters())
    kernels = projector.kernels_for(torch.empty(0, device=weight.device))
    if kernels is None:
        return None
    if saved is None:
        saved = ranks.on_main(lambda: _chosen(model, kernels, shapes, weight))
    kernels.import_choices(saved)
    kernels.set_tuning("rule")
    return saved


def _chosen(model, kernels, shapes, weight):
    projector, grid = model.projector, model.patch_grid
    plans = [
        kernels.pool_plan([grid] * len(counts), [sides_of(count, grid) for count in counts], projector.mode)
        for counts in shapes
    ]
    is_frozen = {
        "features": not any(p.requires_grad for p in model.vision_tower.parameters()),
        "norm": not projector.norm.weight.requires_grad,
        "gate_up": not projector.gate_up.weight.requires_grad,
        "down": not projector.down.weight.requires_grad,
    }
    return kernels.warm_up(
        plans,
        projector.gate_up.in_features,
        projector.down.in_features,
        projector.down.out_features,
        dtype=weight.dtype,
        device=weight.device,
        frozen=[name for name, frozen in is_frozen.items() if frozen],
    )
