"""Progress of work whose length is known: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

QUIET_S = 10.0
"""Seconds between two lines; work that is done sooner says nothing."""


class Bar:
    """`with Bar(...) as bar: ... bar.update(n)`; silent on ranks whose `say` prints nothing.

    Args:
        total: steps of the work, in `unit`s.
        name: the word that the lines begin with.
        say: prints a line.
        is_main: whether this rank is the one that shows it.
    """

    def __init__(self, total: int, name: str, unit: str, say: Callable[[str], None], is_main: bool = True):
        self.total, self.name, self.unit, self.say = total, name, unit, say
        self.is_terminal = sys.stdout.isatty() and is_main
        self.done = 0
        self.begin = self.said = time.monotonic()
        self._bar = tqdm(
            total=total,
            desc=name,
            unit=unit,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            disable=not self.is_terminal,
        )

    def update(self, number: int = 1) -> None:
        """So many more are done."""
        self.done += number
        self._bar.update(number)
        now = time.monotonic()
        if not self.is_terminal and now - self.said >= QUIET_S and self.done:
            left = (now - self.begin) / self.done * (self.total - self.done)
            share = f"{self.done} of {self.total} {self.unit}"
            self.say(
                f"{self.name:10s}{share}, {tqdm.format_interval(now - self.begin)} so far, {tqdm.format_interval(left)} left"
            )
            self.said = now

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """The work is over."""
        self._bar.close()
