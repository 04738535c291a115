"""Laws of the study's statistics: intervals cover, pairing pays, verdicts say no more than the draws show."""

import numpy as np
import pytest

from tokenflex.study.statistics import MARGIN, Difference, holm, paired_difference, verdicts


def answers(rng, num_seeds, images, mean, seed_spread=0.0):
    """[S, Q] answers of a mean accuracy whose seeds differ by `seed_spread`."""
    share = np.clip(mean + seed_spread * rng.standard_normal((num_seeds, 1)), 0, 1)
    return rng.random((num_seeds, len(images))) < share


TASKS = np.repeat(["a", "b", "c"], 80)
IMAGES = np.arange(240) // 2


def test_equal_arms_differ_by_exactly_nothing():
    ours = answers(np.random.default_rng(0), 5, IMAGES, 0.6)
    found = paired_difference(ours, ours, TASKS, IMAGES)
    assert (found.mean, found.low, found.high) == (0, 0, 0) and found.p_better == found.p_worse == 1


def test_swapping_arms_swaps_the_sign():
    rng = np.random.default_rng(1)
    ours, theirs = answers(rng, 4, IMAGES, 0.6), answers(rng, 4, IMAGES, 0.5)
    one, other = paired_difference(ours, theirs, TASKS, IMAGES), paired_difference(theirs, ours, TASKS, IMAGES)
    assert one.mean == -other.mean and one.low == pytest.approx(-other.high) and one.p_better == other.p_worse


def test_tasks_weigh_alike_however_many_questions_they_have():
    tasks = np.array(["a"] * 90 + ["b"] * 10)
    ours = np.tile(tasks == "b", (3, 1))
    found = paired_difference(ours, np.zeros_like(ours), tasks, np.arange(100))
    assert found.mean == found.low == found.high == 0.5


def test_95_percent_intervals_cover():
    """Arms of a known difference, whose seeds and questions both vary: the interval holds it about 19 times of 20."""
    rng = np.random.default_rng(2)
    hits, trials = 0, 80
    for trial in range(trials):
        hardness = rng.random(240) * 0.6 + 0.2
        shift = 0.05 + 0.04 * rng.standard_normal((8, 1))  # of each pair of seeds
        ours = rng.random((8, 240)) < np.clip(hardness + shift, 0, 1)
        theirs = rng.random((8, 240)) < hardness
        found = paired_difference(ours, theirs, TASKS, np.arange(240), draws=300, seed=trial)
        hits += found.low <= 0.05 <= found.high
    assert 0.85 <= hits / trials <= 0.99


def test_seeds_that_differ_widen_the_interval_and_repeated_questions_do_not_narrow_it():
    rng = np.random.default_rng(3)
    base = rng.random((6, 240)) < 0.5
    calm = paired_difference(base | (rng.random((6, 240)) < 0.1), base, TASKS, IMAGES)
    spread = np.linspace(0, 0.5, 6)[:, None]
    wild = paired_difference(base | (rng.random((6, 240)) < spread), base, TASKS, IMAGES)
    assert wild.high - wild.low > 1.5 * (calm.high - calm.low)
    ours, theirs = rng.random((6, 240)) < 0.6, rng.random((6, 240)) < 0.5
    once = paired_difference(ours, theirs, TASKS, np.arange(240))
    thrice = paired_difference(
        *(np.repeat(x, 3, 1) for x in (ours, theirs)), np.repeat(TASKS, 3), np.repeat(np.arange(240), 3)
    )
    assert thrice.high - thrice.low == pytest.approx(once.high - once.low, rel=0.1)


@pytest.mark.parametrize(
    "shapes, message",
    [(((1, 9), (1, 9), 9, 9), "1 seed"), (((2, 9), (2, 8), 9, 9), "for"), (((2, 9), (2, 9), 9, 8), "for")],
)
def test_what_does_not_fit_is_refused(shapes, message):
    ours, theirs, tasks, images = (np.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        paired_difference(ours, theirs, tasks, images)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def made(p_better=1.0, p_worse=1.0, p_inferior=1.0):
    return Difference(0.0, 0.0, 0.0, p_better, p_worse, p_inferior, 5)


def test_verdicts_are_corrected_over_the_family():
    alone = [made(p_better=0.02, p_inferior=0.001)]
    assert verdicts(alone) == ["better"]
    family = [*alone, made(p_worse=0.001), made(p_inferior=0.0001), made(p_inferior=0.4)]
    assert verdicts(family) == ["non-inferior", "worse", "non-inferior", "inconclusive"]


def test_a_margin_is_a_point():
    rng = np.random.default_rng(5)
    base = rng.random((5, 3000)) < 0.6
    tasks, images = np.repeat(["a", "b", "c"], 1000), np.arange(3000)
    flips = rng.random((5, 3000)) < 0.002
    found = paired_difference(base ^ flips, base, tasks, images)
    assert abs(found.mean) < MARGIN and verdicts([found]) == ["non-inferior"]
