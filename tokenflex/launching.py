"""What every entry point does around its work: one-line errors, output from rank 0 only, a clean end of the process group."""

import os
import sys
import traceback

from .errors import UserError


class Say:
    """`say(text)` prints on the main rank; entry points clear `is_main` on the others once they know their rank."""

    def __init__(self):
        self.is_main = int(os.environ.get("RANK", "0")) == 0

    def __call__(self, text):
        if self.is_main:
            print(text, flush=True)


def entry_point(main, arguments):
    """Run `main(arguments, say)` and return the process' exit status.

    A `UserError` is printed as one line (once, by the main rank, as every rank meets it) with its status; with
    `arguments.debug` the traceback follows.
    """
    say = Say()
    try:
        return main(arguments, say)
    except UserError as error:
        if say.is_main or not _is_distributed():
            print(f"error: {error}", file=sys.stderr, flush=True)
        if arguments.debug:
            traceback.print_exc()
        return error.status
    finally:
        # A rank that fails keeps its connections until it has told why: the others would report their loss before it.
        if sys.exc_info()[0] is None and _is_distributed():
            import torch

            torch.distributed.destroy_process_group()


def _is_distributed():
    if "torch" not in sys.modules:
        return False
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()
