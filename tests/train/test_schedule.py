"""Laws of the learning rate: it rises over the warm-up, falls as its shape says, and ends where it should."""

import math

import pytest

from tokenflex.config import OptimizerConfig
from tokenflex.train.schedule import SHAPES, Schedule, lr_multiplier


def rates(num_steps, **settings):
    config = OptimizerConfig(**settings)
    return [lr_multiplier(step, num_steps, config) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
def test_a_rate_is_a_share_of_the_peak_that_rises_then_never_rises_again(schedule, warmup, num_steps):
    values = rates(num_steps, schedule=schedule, warmup_fraction=warmup)
    begin = math.ceil(warmup * num_steps)
    assert all(0 <= value <= 1 for value in values)
    assert values[:begin] == [(step + 1) / begin for step in range(begin)]
    assert all(later <= earlier for earlier, later in zip(values[begin:], values[begin + 1 :]))
    if begin < num_steps:
        assert values[begin] == 1.0, "the first step after the warm-up is at the peak"


def test_shapes_by_their_numbers():
    """Ten steps, two of warm-up: a share of 0, 1/8, ... 7/8 of the way is behind the steps after it."""
    ways = [step / 8 for step in range(8)]
    assert rates(10, schedule="linear", warmup_fraction=0.2) == pytest.approx([0.5, 1.0, *(1 - way for way in ways)])
    cosine = [0.5 * (1 + math.cos(math.pi * way)) for way in ways]
    assert rates(10, schedule="cosine", warmup_fraction=0.2) == pytest.approx([0.5, 1.0, *cosine])
    assert rates(10, schedule="constant", warmup_fraction=0.2) == [0.5] + [1.0] * 9


@pytest.mark.parametrize("schedule", SHAPES)
def test_the_final_share_is_what_the_shape_falls_to(schedule):
    whole = rates(50, schedule=schedule, warmup_fraction=0.0)
    lifted = rates(50, schedule=schedule, warmup_fraction=0.0, final_fraction=0.25)
    assert lifted == pytest.approx([0.25 + 0.75 * value for value in whole])


def test_wsd_stays_at_the_peak_and_falls_at_the_end_alone():
    """Ten steps, two of warm-up, the last four fall: at the peak until step 6, then three quarters, a half, a quarter."""
    found = rates(10, schedule="wsd", warmup_steps=2, decay_fraction=0.4)
    assert found == pytest.approx([0.5, *[1.0] * 6, 0.75, 0.5, 0.25])
    whole = rates(10, schedule="wsd", warmup_fraction=0.0, decay_fraction=1.0)
    assert whole == rates(10, schedule="linear", warmup_fraction=0.0)
    assert rates(10, schedule="wsd", warmup_steps=8, decay_fraction=0.5)[7:] == [1.0, 1.0, 0.5], (
        "no fall in the warm-up"
    )


@pytest.mark.parametrize("schedule", SHAPES)
def test_a_warm_up_in_steps_is_one_in_its_share(schedule):
    assert rates(40, schedule=schedule, warmup_steps=10) == rates(40, schedule=schedule, warmup_fraction=0.25)


def test_each_group_has_its_own_peak():
    config = OptimizerConfig(schedule="linear", warmup_fraction=0.0)
    schedule = Schedule([1e-3, 4e-5], 4, config)
    assert schedule(0) == [1e-3, 4e-5]
    assert schedule(3) == pytest.approx([0.25e-3, 1e-5])
