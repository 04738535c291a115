"""Which samples, at which visual-token counts, make which pack of which step; `docs/packing.md` explains it.

`order` has the order of an epoch in O(1) memory, `mixture` the sources, `balance` the packing itself, `window` the rows, and
`planner` what the trainer calls.
"""

from .mixture import Mixture, Source
from .planner import EMPTY, LOSS_WEIGHTS, LeftOut, Pack, Planner, Position, StepPlan

__all__ = ["EMPTY", "LOSS_WEIGHTS", "LeftOut", "Mixture", "Pack", "Planner", "Position", "Source", "StepPlan"]
