#!/usr/bin/env python3
"""Inside a SLURM job: check the nodes, start the ranks, decide about a requeue. The scripts beside this one call it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # with a container, nothing is installed on the host

from tokenflex.slurm.job import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
