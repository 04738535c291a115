"""Which samples, at which visual-token counts, make which pack of which step; `docs/packing.md` explains it.

`order` has the order of an epoch in O(1) memory, `mixture` the sources, `balance` the packing itself, `window` the rows, and
`planner` what the trainer calls.
"""

from .mixture import Lengths, Mixture, Source
from .planner import LOSS_WEIGHTS, Planner
from .steps import EMPTY, Dropped, Pack, Position, StepPlan
from .table import LengthTable

__all__ = [
    "EMPTY",
    "LOSS_WEIGHTS",
    "Dropped",
    "LengthTable",
    "Lengths",
    "Mixture",
    "Pack",
    "Planner",
    "Position",
    "Source",
    "StepPlan",
]
