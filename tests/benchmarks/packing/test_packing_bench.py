"""The benchmark's own parts: every rule packs everything once and within its capacity, and speaks of the same figures."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from peers import TABLE
from workload import workload

sys.path.append(str(Path(__file__).resolve().parents[3] / "build" / "peers"))  # last: our own packages come first
PACKAGES = {"binpacking (ms-swift)": "binpacking", "TRL pack_dataset": "trl", "OLMo-core": "olmo_core"}


@pytest.mark.parametrize("name", TABLE)
def test_every_packer_packs_everything_once(name):
    if name in PACKAGES and not importlib.util.find_spec(PACKAGES[name]):
        pytest.skip(f"{PACKAGES[name]} is installed by make bench-packing only")
    text, tiles = workload(2_500)
    lengths = np.minimum(text + 144 * tiles, 8192)
    packs = TABLE[name][0](lengths, tiles, 8192)
    np.testing.assert_array_equal(np.sort(np.concatenate(packs)), np.arange(2_500))
    assert max(int(lengths[pack].sum()) for pack in packs) <= 8192


def test_the_workload_has_the_statistics_it_says():
    text, tiles = workload(50_000)
    assert (tiles == 0).mean() == pytest.approx(0.1, abs=0.01)
    assert tiles[tiles > 0].mean() == pytest.approx(3.9, abs=0.15)
    assert 100 < np.median(text) < 300 and 3000 < text.max() < 8192
    np.testing.assert_array_equal(workload(50_000)[0], text)
