"""The exceptions that a user is meant to read: a single line, no traceback unless `--debug`."""

from .layout import DIVERGED, FAILED, SAVE_FAILED, USER_ERROR


class UserError(Exception):
    """Something the user can mend. The message says where, what came, what was wanted and what to do.

    The entry points print it as one line and exit with its `status`; with `--debug` the traceback follows.
    """

    status = USER_ERROR


class Diverged(UserError):
    """Training goes nowhere although bad steps were skipped and the run was taken back."""

    status = DIVERGED


class SavesFailed(UserError):
    """So many saves in a row have failed that going on would put the work done at risk."""

    status = SAVE_FAILED


class OtherRankFailed(UserError):
    """This rank ends because another one did; the message says which and why."""

    status = FAILED
