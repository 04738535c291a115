"""What a start does until its first step: a line per stage with how long it took, and sooner where it takes long.

Standard library only: an entry point uses it before anything heavy is imported.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_S = 3.0
"""A stage that lasts longer says what it is doing before it is done."""


@contextmanager
def stage(name: str, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Within this context a stage of a start runs; `what` says in words what it does. A stage that fails says nothing."""
    begin = time.monotonic()
    impatience = threading.Timer(PATIENCE_S, say, [f"{name:10s}{what} ..."])
    impatience.daemon = True
    impatience.start()
    try:
        yield
    finally:
        impatience.cancel()
    say(f"{name:10s}{what}: {time.monotonic() - begin:.1f} s")
