"""The decode benchmark runs and its figures are of the right things."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from decode_bench import jpegs, measure


def test_the_benchmark_measures_every_way():
    (row,) = measure([(150, 150)], images_per_size=2, num_passes=2)
    assert row["ours_over_bare"] > 0.2 and row["pillow_over_bare"] > 0.2 and row["bare_ms"] > 0
    assert row["num_tiles"] == 1
    assert len(set(jpegs((60, 40), 7))) == 7
