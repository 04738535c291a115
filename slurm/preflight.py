#!/usr/bin/env python3
"""One node's part of the check before ranks start; slurm/job.py runs it on every node."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokenflex.slurm.preflight import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
