"""What a step did, and how far a run has come: the record that every checkpoint holds, from which a run goes on."""

from dataclasses import asdict, dataclass, field

import torch

from ..plan import Position


@dataclass
class Progress:
    """Counters and positions of a run; the same on every rank.

    Its form in a checkpoint's manifest is `to_dict`'s, whose keys never change.
    """

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    position: dict = field(default_factory=lambda: {"epoch": 0, "step": 0})
    """The next step in the data, as `Position.as_dict` writes it."""
    data: str = ""
    """Digest of the data that the position is in; empty in checkpoints from before it was kept."""
    kernel_choices: dict | None = None
    """Which configuration of every kernel the run began with, so that it sums in the same order to its end; None on a CPU."""
    num_skipped: int = 0
    """Steps that moved nothing, because something was wrong with them."""
    bad: list[list[int]] = field(default_factory=list)
    """(epoch, step) of the steps skipped in a row until now."""
    excluded_steps: list[list[int]] = field(default_factory=list)
    """(epoch, step) never to run again: the run went back over them."""
    num_rollbacks: int = 0
    """Times it went back since it last got beyond `furthest`."""
    furthest: int = 0
    """The step at which it last went back."""
    history: dict[str, list[float]] = field(default_factory=dict)
    """Losses and gradient norms that the spike filter compares with."""
    validation: dict[str, float] = field(default_factory=dict)
    """The last validation: its `step` and `loss`; empty before the first."""
    num_samples: int = 0
    """Samples met over all ranks, brought up to date when logged and saved."""
    num_bad_samples: int = 0
    """Those among them that could not be used."""

    def data_position(self) -> Position:
        """Where in the data the run is."""
        return Position(**self.position)

    def to_dict(self) -> dict:
        """Plain JSON values."""
        record = asdict(self)
        return {("passed_over" if name == "excluded_steps" else name): value for name, value in record.items()}

    @classmethod
    def from_dict(cls, record: dict) -> "Progress":
        """The progress of a manifest; counters that it does not have yet start at zero."""
        return cls(**{("excluded_steps" if name == "passed_over" else name): value for name, value in record.items()})


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """One optimizer step, as every rank sees it but for `sample_ids`, which are this rank's.

    step: 0-based. position, next_position: in the data. loss: over all ranks, as `loss_parts` are of this rank only (device
    scalars, by term). problem: why the weights did not move, empty where they did. digest: of the step's plan.
    """

    step: int
    position: Position
    next_position: Position
    sample_ids: list[int]
    loss: float
    loss_parts: dict[str, torch.Tensor]
    grad_norm: float
    problem: str
    digest: str
