"""The keyed draw: a pure function, with the distribution that was asked for, at any point of a schedule."""

import numpy as np

from tokenflex.budget import VisualTokenBudget, keyed_uniform

BUDGET = VisualTokenBudget(counts=(64, 144, 256), probabilities=(0.2, 0.3, 0.5))


def test_a_draw_depends_on_seed_epoch_and_sample_alone():
    ids = np.arange(1000)
    draw = BUDGET.draw(7, 3, ids, ids)
    shuffled = np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(BUDGET.draw(7, 3, ids[shuffled], ids), draw[shuffled])
    np.testing.assert_array_equal([BUDGET.draw(7, 3, ids[i : i + 1], ids[:1])[0] for i in range(50)], draw[:50])
    for other in (BUDGET.draw(8, 3, ids, ids), BUDGET.draw(7, 4, ids, ids)):
        assert 0.2 < (other != draw).mean() < 0.9


def test_shares_are_the_probabilities():
    counts = BUDGET.draw(0, 0, np.arange(200_000), np.arange(200_000))
    shares = [(counts == count).mean() for count in BUDGET.counts]
    np.testing.assert_allclose(shares, BUDGET.probabilities, atol=4e-3)


def test_uniforms_are_uniform_and_uncorrelated_over_epochs():
    a, b = keyed_uniform(0, 0, np.arange(100_000)), keyed_uniform(0, 1, np.arange(100_000))
    assert a.min() >= 0 and a.max() < 1 and len(np.unique(a)) == len(a)
    np.testing.assert_allclose(np.histogram(a, 20, (0, 1))[0] / 5000, 1, atol=0.06)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.015
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.015


def test_a_schedule_moves_the_shares_linearly():
    budget = VisualTokenBudget(
        counts=(4, 16), probabilities=(0.5, 0.5), schedule=((1000, (1.0, 0.0)), (3000, (0.0, 1.0)))
    )
    np.testing.assert_allclose(budget.probabilities_at([0, 1000, 2000, 3000, 9999])[:, 1], [0, 0, 0.5, 1, 1])
    ids = np.arange(20_000)
    assert (budget.draw(0, 0, ids, np.full(20_000, 500)) == 4).all()
    assert (budget.draw(0, 0, ids, np.full(20_000, 5000)) == 16).all()
    assert abs((budget.draw(0, 0, ids, np.full(20_000, 2000)) == 4).mean() - 0.5) < 0.02
