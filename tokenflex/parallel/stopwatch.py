"""How long a rank's own forward and backward passes take, without waiting for the device to find out."""

import time

import torch


class Stopwatch:
    """`start` and `stop` around work; `take` gives the seconds of all of it since the last time.

    On a GPU the times are the device's own, by events in its stream: reading them waits for nothing once the host has seen a
    later result, as it has when a step's loss is known. On a CPU they are the host's.
    """

    def __init__(self, device: torch.device):
        self._is_gpu = device.type == "cuda"
        self._begin: float | torch.cuda.Event | None = None
        self._pairs: list[tuple] = []

    def start(self) -> None:
        """Work begins; a start without a stop is forgotten."""
        self._begin = self._now()

    def stop(self) -> None:
        """Work that was started is all given to the device."""
        if self._begin is not None:
            self._pairs.append((self._begin, self._now()))
            self._begin = None

    def take(self) -> float:
        """Seconds of the work since the last call, of what is done."""
        pairs, self._pairs = self._pairs, []
        if self._is_gpu:
            return sum(begin.elapsed_time(end) for begin, end in pairs if end.query()) / 1000
        return sum(end - begin for begin, end in pairs)

    def _now(self) -> "float | torch.cuda.Event":
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
