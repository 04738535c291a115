"""A study: arms trained by the trainer itself under a protocol that is written first, and what may be said of the outcome.

`arms` has what is compared, `jobs` trains and records it, `statistics` and `verdicts` judge, `report` writes tables, plots and
the page. `launch/paper.py` is the command; `docs/paper-protocol.md` the protocol.
"""
