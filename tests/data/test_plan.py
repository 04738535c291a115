"""Laws of the plan: nothing lost or doubled, every pack fits, equal counts in lockstep, a pure function of its arguments."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.budget import VisualTokenBudget
from tokenflex.config import DataConfig
from tokenflex.data import Planner, Position
from tokenflex.data.loader import micro_batches, num_micro_steps
from tokenflex.errors import UserError


def make_index(rng, number, text_share=0.2, max_images=3, without_answer=0.0):
    images = np.where(rng.random(number) < text_share, 0, rng.integers(1, max_images + 1, number))
    learned = np.where(rng.random(number) < without_answer, 0, rng.integers(1, 9, number))
    return SimpleNamespace(
        text_tokens=rng.integers(10, 120, number),
        learned_tokens=learned,
        num_tiles=images,
        shard_of=lambda sample: "some.tar",
    )


def make_planner(index, seed=0, counts=(4, 16, 36), **data):
    probabilities = tuple([1 / len(counts)] * len(counts))
    section = {"pack_length": 400, "max_images_per_pack": 8, "packs_per_step": 8, "lockstep_packs": 4, **data}
    budget = VisualTokenBudget(counts=counts, probabilities=probabilities)
    return Planner(index, budget, DataConfig(**section), seed, "sqrt")


@settings(max_examples=40, deadline=None)
@given(
    number=st.integers(1, 400),
    seed=st.integers(0, 2**31),
    text_share=st.sampled_from([0.0, 0.2, 1.0]),
    lockstep=st.sampled_from([1, 2, 4, 8]),
)
def test_every_sample_once_every_pack_fits(number, seed, text_share, lockstep):
    index = make_index(np.random.default_rng(seed), number, text_share)
    planner = make_planner(index, seed, lockstep_packs=lockstep)
    for epoch in (0, 1):
        packs = [pack for step in planner.epoch(epoch) for pack in step]
        assert len(packs) % 8 == 0
        ids = np.concatenate([pack.sample_ids for pack in packs])
        np.testing.assert_array_equal(np.sort(ids), np.arange(number))
        for pack in packs:
            lengths = index.text_tokens[pack.sample_ids] + index.num_tiles[pack.sample_ids] * pack.counts
            assert lengths.sum() <= 400 and index.num_tiles[pack.sample_ids].sum() <= 8
            assert ((pack.counts == 0) == (index.num_tiles[pack.sample_ids] == 0)).all()


def test_rows_share_one_count_but_for_the_leftovers():
    planner = make_planner(make_index(np.random.default_rng(0), 3000))
    rows = [step[i : i + 4] for step in planner.epoch(0) for i in (0, 4)]
    distinct = [len({int(c) for pack in row for c in pack.counts if c}) for row in rows]
    assert sum(number > 1 for number in distinct) <= 3  # at most the leftovers of three counts
    assert np.mean([number <= 1 for number in distinct]) > 0.97


def test_packs_are_well_filled():
    index = make_index(np.random.default_rng(1), 5000, max_images=1)
    packs = [pack for step in make_planner(index, max_images_per_pack=99).epoch(0) for pack in step]
    used = sum(int((index.text_tokens[p.sample_ids] + index.num_tiles[p.sample_ids] * p.counts).sum()) for p in packs)
    assert used / (400 * len(packs)) > 0.95


def test_the_plan_is_pure_and_epochs_differ():
    index = make_index(np.random.default_rng(2), 500)
    a, b = make_planner(index, seed=5), make_planner(index, seed=5)
    for position in (Position(0, 0), Position(0, 3), Position(2, 1)):
        one, two = next(a.steps_from(position)), next(b.steps_from(position))
        assert one.position == two.position == position and one.total_weight == two.total_weight
        for p, q in zip(one.packs, two.packs, strict=True):
            np.testing.assert_array_equal(p.sample_ids, q.sample_ids)
            np.testing.assert_array_equal(p.counts, q.counts)
    first = [np.concatenate([p.sample_ids for p in next(a.steps_from(Position(e, 0))).packs]) for e in (0, 1)]
    assert len(first[0]) != len(first[1]) or (first[0] != first[1]).any()
    other = next(make_planner(index, seed=6).steps_from(Position(0, 0)))
    assert len(other.packs[0].sample_ids) and not np.array_equal(
        other.packs[0].sample_ids, next(a.steps_from(Position())).packs[0].sample_ids
    )


def test_resuming_at_any_step_gives_the_rest_of_the_stream():
    planner = make_planner(make_index(np.random.default_rng(3), 300))
    stream = planner.steps_from(Position())
    steps = [next(stream) for _ in range(2 * len(planner.epoch(0)) + 3)]
    for at in range(len(steps) - 1):
        resumed = next(planner.steps_from(Position(steps[at].position.epoch, steps[at].position.step + 1)))
        assert resumed.position == steps[at + 1].position
        for pack, expected in zip(resumed.packs, steps[at + 1].packs, strict=True):
            np.testing.assert_array_equal(pack.sample_ids, expected.sample_ids)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("per_micro", [1, 2, 8])
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(num_ranks, per_micro):
    planner = make_planner(make_index(np.random.default_rng(4), 200))
    step = next(planner.steps_from(Position()))
    whole = np.sort(np.concatenate([pack.sample_ids for pack in step.packs]))
    shares = [list(micro_batches([step], rank, num_ranks, per_micro)) for rank in range(num_ranks)]
    assert {len(share) for share in shares} == {num_micro_steps(8, num_ranks, per_micro)}
    assert all([plan.is_last for plan in share] == [False] * (len(share) - 1) + [True] for share in shares)
    np.testing.assert_array_equal(np.sort(np.concatenate([p.sample_ids for share in shares for p in share])), whole)


@pytest.mark.parametrize("window", [1, 37, 100, 1000])
def test_windows_keep_their_order_and_lose_nothing(window):
    planner = make_planner(make_index(np.random.default_rng(9), 300), shuffle_window=window, lockstep_packs=2)
    steps = planner.epoch(1)
    ids = np.concatenate([pack.sample_ids for step in steps for pack in step])
    np.testing.assert_array_equal(np.sort(ids), np.arange(300))
    np.testing.assert_array_equal(np.sort(ids // window), ids // window)
    assert window == 1 or not np.array_equal(ids, np.sort(ids))


def test_total_weight_is_that_of_the_learned_tokens():
    index = make_index(np.random.default_rng(5), 100)
    step = next(make_planner(index).steps_from(Position()))
    ids = np.concatenate([pack.sample_ids for pack in step.packs])
    assert step.total_weight == pytest.approx(np.sqrt(index.learned_tokens[ids]).sum())


def test_samples_without_an_answer_are_left_out_and_counted():
    index = make_index(np.random.default_rng(6), 200, without_answer=0.3)
    planner = make_planner(index)
    ids = np.concatenate([pack.sample_ids for step in planner.epoch(0) for pack in step])
    np.testing.assert_array_equal(np.sort(ids), np.flatnonzero(index.learned_tokens))
    assert planner.num_without_answer == (index.learned_tokens == 0).sum() > 0


def test_over_long_samples_stop_or_are_dropped_by_policy():
    index = make_index(np.random.default_rng(7), 50)
    index.text_tokens[17] = 5000
    with pytest.raises(UserError, match=r"some.tar: sample 17 .* data.pack_length .* data.over_long=drop"):
        make_planner(index)
    planner = make_planner(index, over_long="drop")
    assert planner.num_over_long == 1 and 17 not in planner.usable


def test_nothing_usable_is_an_error():
    with pytest.raises(UserError, match="no sample is usable"):
        make_planner(make_index(np.random.default_rng(8), 5, without_answer=1.1))


@pytest.mark.parametrize(
    "packs, ranks, per_micro, part", [(8, 3, 1, "does not divide over 3 ranks"), (12, 2, 4, "divisor of 6")]
)
def test_ranks_that_do_not_divide_are_refused(packs, ranks, per_micro, part):
    with pytest.raises(UserError, match=part):
        num_micro_steps(packs, ranks, per_micro)
