"""The forge, once per session."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the jobs' module is imported by name from every test here

from jobs import Forge


@pytest.fixture(scope="session")
def forge(cache_dir, corpus, tmp_path_factory):
    """Starts real training jobs; see `forge.py`."""
    with open(tmp_path_factory.mktemp("forge") / "log", "w+") as log:
        forge = Forge(cache_dir, log)
        yield forge
        forge.close()
