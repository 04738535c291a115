"""The one exception that a user is meant to read: a single line, no traceback unless `--debug`."""


class UserError(Exception):
    """Something the user can mend. The message says where, what came, what was wanted and what to do.

    The entry points print it as one line and exit with status 2; with `--debug` the traceback follows.
    """
