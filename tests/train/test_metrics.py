"""Laws of the metrics: what ranks added one by one is what one rank would have added, by each way of reducing."""

import json

import pytest
import torch
from conftest import OneRank, run_ranks

from tokenflex.train.metrics import Metrics


def metrics_of(**reductions):
    metrics = Metrics()
    for name, reduction in reductions.items():
        metrics.declare(name, reduction)
    return metrics


def test_each_way_of_reducing_over_time():
    metrics = metrics_of(n="count", s="sum", m="mean", p="step_mean", top="max", same="same", last="last")
    for value in (1, 4, 2):
        for name in ("n", "s", "m", "p", "top", "same", "last"):
            metrics.add(name, value)
    record = metrics.read(OneRank())
    assert record == {"n": 7, "s": 7.0, "m": 7 / 3, "p": 7 / 3, "top": 4.0, "same": 7 / 3, "last": 2.0}
    assert isinstance(record["n"], int)


def test_device_scalars_and_names_with_slashes():
    metrics = metrics_of(**{"a/b": "sum", "a/c": "count", "d": "max", "e": "spread"})
    metrics.add("e", torch.tensor(1.0))
    metrics.add("e", 3.0)
    metrics.add("a/b", torch.tensor(0.5))
    metrics.add("a/b", torch.tensor(0.25))
    metrics.add("d", torch.tensor(3.0))
    metrics.add("d", 2.0)
    spread = {"mean": 2.0, "max": 2.0, "rank": 0}
    assert metrics.read(OneRank()) == {"a": {"b": 0.75, "c": 0}, "d": 3.0, "e": spread}


def test_an_interval_without_values_has_no_means_and_begins_anew():
    metrics = metrics_of(n="count", m="mean", p="step_mean", top="max", same="same", last="last")
    empty = {"n": 0, "m": None, "p": None, "top": None, "same": None, "last": None}
    assert metrics.read(OneRank()) == empty
    metrics.add("n", 3)
    metrics.add("m", 3)
    assert metrics.read(OneRank())["n"] == 3
    assert metrics.read(OneRank()) == empty


def test_a_mean_divides_by_weights_and_a_spread_says_whose_the_highest_is():
    metrics = metrics_of(m="mean", own="spread", together="lockstep")
    for value, weight in ((6.0, 2), (3.0, 4)):
        metrics.add("m", value, weight)
        metrics.add("own", value)
        metrics.add("together", value)
    assert metrics.read(OneRank()) == {"m": 1.5, "own": {"mean": 4.5, "max": 4.5, "rank": 0}, "together": 1.0}
    assert metrics.read(OneRank()) == {"m": None, "own": None, "together": None}
    metrics.add("together", 0.0)  # micro-steps without any work have no balance
    assert metrics.read(OneRank())["together"] is None


def test_a_name_must_be_declared_and_only_in_one_way():
    metrics = metrics_of(n="count")
    with pytest.raises(KeyError):
        metrics.add("other", 1)
    with pytest.raises(AssertionError, match="declared twice"):
        metrics.declare("n", "sum")


RANKS = """
import json
import torch
from tokenflex import parallel
from tokenflex.train.metrics import Metrics

parallel.quiet_libraries()
ranks = parallel.join_ranks(parallel.join())
metrics = Metrics()
for name, reduction in (("n", "count"), ("m", "mean"), ("p", "step_mean"), ("top", "max"), ("same", "same"),
                        ("own", "spread"), ("together", "lockstep")):
    metrics.declare(name, reduction)
for values in ((4.0, 1.0), (1.0, 3.0), (0.0, 0.0)):  # the ranks wait for 4 and 3, and have 9 of 14 to do
    metrics.add("together", values[ranks.rank])
metrics.add("own", 0.25 + ranks.rank)
for value in range(3 * ranks.rank, 3 * ranks.rank + 2 + ranks.rank):  # 0 1 on rank 0, 3 4 5 on rank 1
    metrics.add("n", value)
    metrics.add("m", value)
    metrics.add("top", value)
metrics.add("p", 10.0 + ranks.rank)  # once per step on each rank
metrics.add("same", 0.5)
print("READ", json.dumps(metrics.read(ranks)))
torch.distributed.destroy_process_group()
"""


OVER_RANKS = {"own": {"mean": 0.75, "max": 1.25, "rank": 1}, "together": 9 / 14}


def test_ranks_that_add_differently_read_the_same(tmp_path):
    script = tmp_path / "metrics.py"
    script.write_text(RANKS)
    for end in run_ranks(2, [script]):
        assert end.status == 0, end.output[-2000:]
        read = json.loads(end.output.split("READ ")[1].splitlines()[0])
        assert read == {"n": 13, "m": 13 / 5, "p": 21.0, "top": 5.0, "same": 0.5, **OVER_RANKS}
