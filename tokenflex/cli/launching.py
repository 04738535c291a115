"""What every entry point does around its work: one-line errors, output from rank 0 only, a clean end of the process group,
and an exit status that whoever started the job can act on."""

import argparse
import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from ..config import RunConfig
from ..errors import UserError
from ..layout import DONE, FAILED, REQUEUE, RunLayout

STATUS_DIR = "TOKENFLEX_STATUS_DIR"
"""Environment variable: folder where each rank leaves its exit status, for slurm/job.py to find the first that failed."""


class Interrupted(BaseException):
    """A stop signal came where there is nothing new to save: before the first step, in export or evaluation."""


class Say:
    """`say(text)` prints on the main rank; entry points clear `is_main` on the others once they know their rank."""

    def __init__(self) -> None:
        self.is_main = int(_rank()) == 0

    def __call__(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)


def entry_point(
    main: Callable[[argparse.Namespace, Say], int], arguments: argparse.Namespace, is_job: bool = False
) -> int:
    """Run `main(arguments, say)` and return the process' exit status.

    A `UserError` is printed as one line (once, by the main rank, as every rank meets it) with its status; with
    `arguments.debug` the traceback follows. In a job (`is_job`), SIGTERM and SIGUSR1 outside of the training loop, which
    handles them itself, end the process at once with status 75: what is done is saved, the same command does the rest.
    """
    say = Say()
    status = FAILED
    try:
        with _interruptible() if is_job else contextlib.nullcontext():
            status = main(arguments, say)
    except UserError as error:
        status = error.status
        if say.is_main or not _is_distributed():
            print(f"error: {error}", file=sys.stderr, flush=True)
        if arguments.debug:
            traceback.print_exc()
    except Interrupted as stop:
        print(f"stopped by {stop} between saved states; the same command goes on", flush=True)
        leave_status(REQUEUE)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(REQUEUE)  # the other ranks may wait for this one in a collective: no polite goodbye is possible
    finally:
        leave_status(status)
        # A rank that fails keeps its connections until it has told why: the others would report their loss before it.
        if sys.exc_info()[0] is None and _is_distributed():
            import torch

            torch.distributed.destroy_process_group()
    return status


def leave_status(status: int) -> None:
    """Write this rank's exit status where the job that started it looks, if it does; the first word stands."""
    folder = os.environ.get(STATUS_DIR)
    if not folder:
        return
    with contextlib.suppress(FileExistsError), open(Path(folder) / f"rank-{_rank()}", "x", encoding="utf-8") as file:
        file.write(f"{status}\n")


def print_check(config: RunConfig) -> int:
    """Print where a checked configuration's run lives, as one line of JSON; returns the exit status."""
    layout = RunLayout(RunLayout.of(config).root.absolute())
    cache = str(Path(config.data.cache_dir).expanduser().absolute())
    print(json.dumps({"folder": str(layout.root), "checkpoints": str(layout.checkpoints), "writable": [cache]}))
    return DONE


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within, SIGTERM and SIGUSR1 raise `Interrupted` wherever the main thread is."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number).name)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _rank() -> str:
    """This process' rank as text, before anything has joined the job."""
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def _is_distributed() -> bool:
    if "torch" not in sys.modules:
        return False
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()
