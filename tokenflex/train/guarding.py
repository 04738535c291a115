"""What holds around a run from its first to its last moment: one writer per folder, a watchdog per rank."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator

from ..checkpoint import RunLock
from ..config import TrainConfig
from ..errors import OtherRankFailed
from ..layout import RunLayout
from ..parallel import Heartbeat, Ranks


class SoleWriter:
    """Within this context no other job may write to the run's folder.

    Raises:
        UserError: another job does.
    """

    def __init__(self, layout: RunLayout, ranks: Ranks):
        self.layout, self.ranks = layout, ranks
        self._lock: RunLock | None = None

    def __enter__(self) -> "SoleWriter":
        self.ranks.on_main(self._acquire)
        return self

    def _acquire(self) -> None:
        self.layout.root.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(self.layout.root)

    def __exit__(self, *exception: object) -> None:
        if self._lock:
            self._lock.release()


@contextlib.contextmanager
def watched(layout: RunLayout, settings: TrainConfig, ranks: Ranks) -> Iterator[Heartbeat]:
    """Within this context a watchdog looks after this rank; an error that only echoes another rank's says so.

    Raises:
        OtherRankFailed: another rank failed or died first.
    """
    if ranks.is_main and layout.health.exists():
        shutil.rmtree(layout.health)
    attempt = ranks.on_main(lambda: secrets.token_hex(4))
    folder = layout.health / attempt
    heartbeat = Heartbeat(ranks.launch, folder, settings.hang_timeout_s, settings.startup_timeout_s)
    try:
        yield heartbeat
    except Exception as error:
        first = heartbeat.failed(error)
        if first:
            raise OtherRankFailed(f"rank {ranks.rank} ended, because {first}") from None
        raise
    heartbeat.close()
