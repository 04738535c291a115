"""What a process' exit status says to whoever started it: which of them mean "start me again"."""

DONE = 0
"""The run is complete."""
USER_ERROR = 2
"""Something the user can mend; the one line on stderr says what."""
DIVERGED = 65
"""Too many steps in a row were not finite or far out, and going back did not help (EX_DATAERR)."""
HUNG = 70
"""The watchdog ended the job: a rank stopped, died or left the others waiting (EX_SOFTWARE)."""
SAVE_FAILED = 74
"""Too many saves in a row failed: disk full or input/output errors (EX_IOERR)."""
REQUEUE = 75
"""Stopped by a signal with everything saved: the same command goes on from there (EX_TEMPFAIL). The only one to requeue."""
