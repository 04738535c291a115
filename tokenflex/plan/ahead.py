"""Plans made beside the step that runs: a window of 1,024 ranks takes longer to plan than a step may wait."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
END = object()


def ahead(items: Iterable[T], number: int) -> Generator[T, None, None]:
    """Yield `items` in their order, made by a thread that is up to `number` of them ahead; it begins with the first one asked for.

    Raises:
        whatever making an item raises, in its place.
    """
    ready: queue.Queue[Any] = queue.Queue(number)
    is_closed = threading.Event()

    def put(entry: Any) -> bool:
        while not is_closed.is_set():
            try:
                ready.put(entry, timeout=0.2)
                return True
            except queue.Full:
                pass
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((END, None))
        except BaseException as error:  # raised where the item is asked for
            put((END, error))

    thread = threading.Thread(target=make, name="plan", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is END:
                return
            yield item
    finally:
        is_closed.set()
