"""Laws of the plan: nothing lost or doubled, every pack fits, equal counts in lockstep, a pure function of its arguments."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.budget import VisualTokenBudget
from tokenflex.config import DataConfig
from tokenflex.data.loader import micro_batches, num_micro_steps
from tokenflex.errors import UserError
from tokenflex.plan import Dropped, Mixture, Planner, Position, Source
from tokenflex.plan.balance import MAX_LEFT_OVER, balance, trim
from tokenflex.plan.order import MixtureOrder, SourceOrder, permute
from tokenflex.plan.planner import PLANNER_VERSION
from tokenflex.plan.table import LengthTable


def make_index(rng, number, text_share=0.2, max_images=3, without_answer=0.0):
    images = np.where(rng.random(number) < text_share, 0, rng.integers(1, max_images + 1, number))
    learned = np.where(rng.random(number) < without_answer, 0, rng.integers(1, 9, number))
    return LengthTable(
        text=rng.integers(10, 120, number), tiles=images, learned=learned, name="some.tar", shard_size=50
    )


def make_planner(index, seed=0, counts=(4, 16, 36), schedule=(), **data):
    probabilities = tuple([1 / len(counts)] * len(counts))
    section = {"pack_length": 400, "max_images_per_pack": 8, "packs_per_step": 8, "lockstep_packs": 4, **data}
    budget = VisualTokenBudget(counts=counts, probabilities=probabilities, schedule=schedule)
    return Planner(index, budget, DataConfig(**section), seed, "sqrt")


def packs_of(planner, epoch=0):
    return [pack for step in planner.epoch_steps(epoch) for pack in step.packs]


def ids_of(packs):
    return np.concatenate([pack.sample_ids for pack in packs])


def assert_same_packs(packs, others):
    for pack, other in zip(packs, others, strict=True):
        for name in ("sample_ids", "counts", "num_messages"):
            np.testing.assert_array_equal(getattr(pack, name), getattr(other, name))


def assert_packs_fit(planner, packs, index):
    limits = planner.limits
    for pack in packs:
        tiles = index.num_tiles[pack.sample_ids]
        assert (index.text_tokens[pack.sample_ids] + tiles * pack.counts).sum() <= limits.max_tokens
        assert tiles.sum() <= limits.max_tiles
        assert ((pack.counts == 0) == (tiles == 0)).all()


@settings(max_examples=40, deadline=None)
@given(
    number=st.integers(8, 400),
    seed=st.integers(0, 2**31),
    text_share=st.sampled_from([0.0, 0.2, 0.95, 1.0]),
    lockstep=st.sampled_from([1, 2, 4, 8]),
    mixing=st.sampled_from(["lockstep", "free"]),
)
def test_every_sample_once_every_pack_fits(number, seed, text_share, lockstep, mixing):
    index = make_index(np.random.default_rng(seed), number, text_share)
    planner = make_planner(index, seed, lockstep_packs=lockstep, mixing=mixing)
    for epoch in (0, 1):
        packs = packs_of(planner, epoch)
        assert len(packs) % 8 == 0
        np.testing.assert_array_equal(np.sort(ids_of(packs)), np.arange(number))
        assert_packs_fit(planner, packs, index)


@settings(max_examples=60, deadline=None)
@given(
    num_packs=st.integers(1, 250),
    size=st.sampled_from([60, 300, 1200, 3000]),
    fill=st.floats(0.6, 1.05),
    seed=st.integers(0, 2**31),
)
def test_balance_never_overfills_a_pack_unless_it_gives_up(num_packs, size, fill, seed):
    rng = np.random.default_rng(seed)
    number = max(1, int(num_packs * 4096 * fill / size))
    tokens, tiles = rng.integers(size // 2, size * 3 // 2, number), rng.integers(0, 4, number)
    pack = balance(tokens, tiles, num_packs, 4096, 40)
    assert len(pack) == number and pack.min() >= -1 and pack.max() < num_packs
    inside = pack >= 0
    if (~inside).sum() <= MAX_LEFT_OVER:
        assert np.bincount(pack[inside], weights=tokens[inside], minlength=num_packs).max() <= 4096
        assert np.bincount(pack[inside], weights=tiles[inside], minlength=num_packs).max() <= 40


def row_waits(pack, tiles, num_packs, row_packs):
    """Tiles that the packs of each row wait for, rows cut in the order of tiles, summed."""
    loads = np.sort(np.bincount(pack, weights=tiles, minlength=num_packs))[::-1].reshape(-1, row_packs)
    return (loads[:, :1] - loads).sum()


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 6),
    row_packs=st.sampled_from([1, 2, 7, 64]),
    count=st.sampled_from([16, 64, 256]),
    seed=st.integers(0, 2**31),
)
def test_trimming_moves_samples_only_and_never_lets_rows_wait_for_more(num_rows, row_packs, count, seed):
    rng, num_packs = np.random.default_rng(seed), num_rows * row_packs
    pack = np.repeat(np.arange(num_packs), rng.integers(1, 12, num_packs))
    tiles = rng.choice([0, 1, 3, 4, 5], len(pack))
    tokens = tiles * count + rng.integers(5, 400, len(pack))
    load = np.bincount(pack, weights=tokens, minlength=num_packs)
    most, before = int(load.max()), row_waits(pack, tiles, num_packs, row_packs)
    after = pack.copy()
    trim(after, tokens, tiles, num_packs, row_packs, most)
    assert after.min() >= 0 and after.max() < num_packs
    assert np.bincount(after, weights=tokens, minlength=num_packs).max() <= most
    assert row_waits(after, tiles, num_packs, row_packs) <= before


def test_one_outlier_does_not_hold_up_its_row():
    """64 packs of 12 tiles, one of 16 and one of 8, all of equal tokens: one exchange levels them."""
    tiles = np.array([3, 3, 3, 3] * 64 + [5, 5, 3, 3] + [1, 1, 3, 3])
    pack, tokens = np.repeat(np.arange(66), 4), np.full(len(tiles), 1000)
    tokens[-8:] += [30, 20, 0, 5, 28, 22, 3, 2]
    trim(pack, tokens, tiles, 66, 33, 4060)
    assert (np.bincount(pack, weights=tiles) == 12).all()


HARD = {
    "heavy tail": lambda rng, n: (np.minimum(rng.pareto(0.9, n) * 30 + 5, 8000), rng.integers(0, 2, n)),
    "only large": lambda rng, n: (rng.integers(4100, 8000, n), np.zeros(n)),
    "just over half and small": lambda rng, n: (np.where(rng.random(n) < 0.4, 4097, 30), np.zeros(n)),
    "twelve tiles": lambda rng, n: (rng.integers(20, 400, n), np.full(n, 12)),
    "mostly text": lambda rng, n: (rng.lognormal(5, 1, n).clip(5, 7000), 4 * (rng.random(n) > 0.95)),
    "tiles fill packs, no text to add": lambda rng, n: (rng.integers(5, 9, n), np.full(n, 16)),
    "all equal": lambda rng, n: (np.full(n, 100), np.ones(n)),
    "one long among many": lambda rng, n: (np.where(np.arange(n) % 500 == 0, 8100, 20), np.zeros(n)),
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("mixing", ["lockstep", "free"])
def test_hard_mixes_lose_nothing_and_resume(case, mixing):
    text, tiles = HARD[case](np.random.default_rng(1), 6000)
    index = LengthTable(text=np.asarray(text).astype(np.int64), tiles=np.asarray(tiles).astype(np.int64), name="t")
    data = {
        "pack_length": 8192,
        "max_images_per_pack": 48,
        "packs_per_step": 16,
        "lockstep_packs": 16,
        "mixing": mixing,
    }
    planner = make_planner(index, counts=(64, 144, 256), over_long="drop", **data)
    dropped = Dropped()
    for _ in planner.windows(0, dropped=dropped):
        pass
    steps = list(planner.epoch_steps(0))
    packs = [pack for step in steps for pack in step.packs]
    lost = dropped.ids.get("longer than a pack", [])
    np.testing.assert_array_equal(np.sort([*ids_of(packs), *lost]), np.arange(6000))
    assert_packs_fit(planner, packs, index)
    for at in {0, len(steps) // 3, len(steps) - 2}:
        state = json.dumps(steps[at].next_position.as_dict())
        assert len(state) <= 1024, state
        assert_same_packs(next(planner.steps_from(Position(**json.loads(state)))).packs, steps[at + 1].packs)


def test_lockstep_rows_share_one_count_but_for_the_last():
    planner = make_planner(make_index(np.random.default_rng(0), 6000))
    packs = packs_of(planner)
    rows = [packs[i : i + 4] for i in range(0, len(packs), 4)]
    distinct = [len({int(c) for pack in row for c in pack.counts if c}) for row in rows]
    assert sum(number > 1 for number in distinct[:-8]) == 0
    assert sum(number > 1 for number in distinct) <= 4  # what is left of three counts when the epoch ends


def test_packs_side_by_side_have_equal_tiles_and_tokens():
    index = make_index(np.random.default_rng(3), 20_000)
    data = {"pack_length": 4000, "max_images_per_pack": 80, "packs_per_step": 16, "lockstep_packs": 16}
    packs = packs_of(make_planner(index, **data))
    packs = packs[: -16 * 4]
    tiles = np.array([index.num_tiles[pack.sample_ids].sum() for pack in packs]).reshape(-1, 16)
    tokens = np.array(
        [(index.text_tokens[p.sample_ids] + index.num_tiles[p.sample_ids] * p.counts).sum() for p in packs]
    )
    assert 1 - tiles.mean() / tiles.max(1).mean() < 0.02
    assert tokens.mean() / 4000 > 0.99


def test_counts_alternate_within_a_window():
    """Stratified: no long stretch of one count, which would be a curriculum nobody asked for."""
    packs = packs_of(make_planner(make_index(np.random.default_rng(5), 8000)))
    row_counts = [max(pack.counts.max(initial=0) for pack in packs[i : i + 4]) for i in range(0, len(packs), 4)]
    runs = np.diff(np.flatnonzero(np.diff(row_counts) != 0))
    assert runs.max() < 12 and runs.mean() < 3


def test_the_plan_is_pure_and_epochs_differ():
    index = make_index(np.random.default_rng(2), 500)
    a, b = make_planner(index, seed=5), make_planner(index, seed=5)
    for position in (Position(0, 0), next(a.steps_from(Position())).next_position, Position(2)):
        one, two = next(a.steps_from(position)), next(b.steps_from(position))
        assert one.position == two.position == position and one.total_weight == two.total_weight
        assert_same_packs(one.packs, two.packs)
        assert one.digest() == two.digest()
    first = [ids_of(next(a.steps_from(Position(epoch))).packs) for epoch in (0, 1)]
    assert len(first[0]) != len(first[1]) or (first[0] != first[1]).any()
    other = next(make_planner(index, seed=6).steps_from(Position()))
    assert other.digest() != next(a.steps_from(Position())).digest()


def test_resuming_at_any_step_gives_the_rest_of_the_stream(monkeypatch):
    monkeypatch.setattr("tokenflex.plan.planner.MIN_WINDOW_PACKS", 64)
    planner = make_planner(make_index(np.random.default_rng(3), 1500))
    stream = planner.steps_from(Position())
    steps = [next(stream) for _ in range(2 * len(list(planner.epoch_steps(0))) + 3)]
    for before, after in zip(steps, steps[1:]):
        state = json.dumps(before.next_position.as_dict())
        assert len(state) <= 1024
        resumed = next(planner.steps_from(Position(**json.loads(state))))
        assert resumed.position == after.position == before.next_position
        assert resumed.total_weight == after.total_weight
        assert_same_packs(resumed.packs, after.packs)


def test_a_thousand_random_resumes_lose_and_double_nothing(monkeypatch):
    """A run that is stopped after a random number of steps, a thousand times over, sees what an unbroken one sees."""
    monkeypatch.setattr("tokenflex.plan.planner.MIN_WINDOW_PACKS", 32)  # many windows per epoch
    index = make_index(np.random.default_rng(8), 1000)
    planner, rng = make_planner(index, window_rows=8), np.random.default_rng(0)
    position, seen, num_resumes = Position(), {}, 0
    while num_resumes < 1000:
        stream = planner.steps_from(Position(**json.loads(json.dumps(position.as_dict()))))
        for _ in range(rng.integers(1, 4)):
            step = next(stream)
            position = step.next_position
            seen.setdefault(step.position.epoch, []).append(ids_of(step.packs))
        num_resumes += 1
    for epoch in range(max(seen)):
        np.testing.assert_array_equal(np.sort(np.concatenate(seen[epoch])), np.arange(1000))
    assert len(seen) > 30


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("per_micro", [1, 2, 8])
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(num_ranks, per_micro):
    planner = make_planner(make_index(np.random.default_rng(4), 200))
    step = next(planner.steps_from(Position()))
    whole = np.sort(ids_of(step.packs))
    shares = [list(micro_batches([step], rank, num_ranks, per_micro)) for rank in range(num_ranks)]
    assert {len(share) for share in shares} == {num_micro_steps(8, num_ranks, per_micro)}
    assert all([plan.is_last for plan in share] == [False] * (len(share) - 1) + [True] for share in shares)
    assert all(plan.next_position == step.next_position for share in shares for plan in share)
    np.testing.assert_array_equal(np.sort(np.concatenate([p.sample_ids for share in shares for p in share])), whole)


@pytest.mark.parametrize("window", [1, 37, 1000])
def test_a_curriculum_is_kept_but_for_one_window_of_the_plan(window):
    """With `shuffle_window` no sample comes much before or after its place: the hard bound on its age."""
    number = 20_000
    planner = make_planner(make_index(np.random.default_rng(9), number), shuffle_window=window)
    ids = ids_of(packs_of(planner, epoch=1))
    np.testing.assert_array_equal(np.sort(ids), np.arange(number))
    lookahead = planner.window_packs * 8  # a pack holds fewer samples than eight
    assert np.abs(ids - np.arange(number)).max() < 2 * lookahead + window
    assert window == 1 or not np.array_equal(ids, np.sort(ids))


def test_a_rare_count_waits_no_longer_than_the_bound(monkeypatch):
    """One count in 500 never fills a row by itself; its samples come all the same, in rows of mixed counts."""
    from tokenflex.plan.window import MAX_WINDOWS_WAITING

    monkeypatch.setattr("tokenflex.plan.planner.MIN_WINDOW_PACKS", 256)  # many windows per epoch
    number, counts = 60_000, (4, 16)
    index = make_index(np.random.default_rng(9), number)
    section = {"pack_length": 400, "max_images_per_pack": 8, "packs_per_step": 32, "lockstep_packs": 32}
    budget = VisualTokenBudget(counts=counts, probabilities=(0.002, 0.998))
    planner = Planner(index, budget, DataConfig(**section), 0, "sqrt")
    arrival, oldest, num_windows, num_mixed = 0, 0, 0, 0
    frontiers = [0]
    for _, window, after in planner.windows(0):
        frontiers.append(after.frontier)
        arrival = np.searchsorted(frontiers, window.samples.position, side="right")
        oldest = max(oldest, int((len(frontiers) - arrival).max()))
        num_windows += 1
        num_mixed += int((window.row_queue < 0).sum())
    assert num_windows > 2 * MAX_WINDOWS_WAITING and num_mixed >= 2
    assert oldest <= MAX_WINDOWS_WAITING + 2


def test_total_weight_is_that_of_the_learned_tokens():
    index = make_index(np.random.default_rng(5), 100)
    step = next(make_planner(index).steps_from(Position()))
    assert step.total_weight == pytest.approx(np.sqrt(index.learned_tokens[ids_of(step.packs)]).sum())


def test_samples_without_an_answer_are_left_out_and_counted():
    index = make_index(np.random.default_rng(6), 200, without_answer=0.3)
    planner, dropped = make_planner(index), Dropped()
    np.testing.assert_array_equal(np.sort(ids_of(packs_of(planner))), np.flatnonzero(index.learned_tokens))
    list(planner.windows(0, dropped=dropped))
    assert dropped.numbers == {"without an answer": (index.learned_tokens == 0).sum()}
    assert sorted(dropped.ids["without an answer"]) == np.flatnonzero(index.learned_tokens == 0).tolist()


def test_over_long_samples_stop_or_are_dropped_by_policy():
    index = make_index(np.random.default_rng(7), 50)
    index.text_tokens[17] = 5000
    with pytest.raises(UserError, match=r"some.tar: sample 17 .* data.pack_length .* data.over_long=drop"):
        make_planner(index)
    planner, dropped = make_planner(index, over_long="drop"), Dropped()
    np.testing.assert_array_equal(np.sort(ids_of(packs_of(planner))), np.delete(np.arange(50), 17))
    list(planner.windows(0, dropped=dropped))
    assert dropped.ids == {"longer than a pack": [17]}


def test_a_sample_is_too_long_only_at_the_counts_that_make_it_so():
    index = make_index(np.random.default_rng(7), 400, max_images=1, text_share=0.0)
    index.text_tokens[:] = 380
    planner = make_planner(index, over_long="drop")
    packs = [pack for pack in packs_of(planner) if len(pack.counts)]
    assert {int(count) for pack in packs for count in pack.counts} == {4, 16}
    assert 200 < len(packs) < 330


IMPOSSIBLE = {
    "no answers": ({"number": 20, "without_answer": 1.1}, {}, "no sample is usable"),
    "fewer samples than a step": ({"number": 7}, {}, "7 samples per epoch cannot fill the 8 packs of a step"),
    "packs below one image": ({"number": 20}, {"counts": (4, 400)}, "a pack holds no image of 400 visual tokens"),
    "everything too long": (
        {"number": 20, "text_share": 0},
        {"pack_length": 37, "over_long": "drop"},
        "no sample is usable",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_plans_are_refused_before_the_first_step(case):
    table, data, part = IMPOSSIBLE[case]
    index = make_index(np.random.default_rng(8), **table)
    if case == "everything too long":
        index.text_tokens[:] += 40
    with pytest.raises(UserError, match=part):
        next(make_planner(index, **data).steps_from(Position()))


@pytest.mark.parametrize(
    "packs, ranks, per_micro, part", [(8, 3, 1, "does not divide over 3 ranks"), (12, 2, 4, "divisor of 6")]
)
def test_ranks_that_do_not_divide_are_refused(packs, ranks, per_micro, part):
    with pytest.raises(UserError, match=part):
        num_micro_steps(packs, ranks, per_micro)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_the_keyed_permutation_is_one(size, key):
    out = permute(np.arange(size), size, key)
    np.testing.assert_array_equal(np.sort(out), np.arange(size))
    np.testing.assert_array_equal(permute(np.arange(size)[::-1], size, key), out[::-1])


def test_the_keyed_permutation_mixes():
    size = 5000
    outs = np.stack([permute(np.arange(size), size, key) for key in range(40)])
    correlation = [np.corrcoef(np.arange(size), out)[0, 1] for out in outs]
    assert np.abs(correlation).max() < 5 / np.sqrt(size)
    assert (outs == np.arange(size)).sum() < 40 + 5 * np.sqrt(40)  # one fixed point each on average
    steps = np.diff(outs, axis=1) % size
    assert abs(steps.mean() / size - 0.5) < 0.01


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=8), min_size=1, max_size=3),
    block_shards=st.integers(1, 5),
    window=st.sampled_from([0, 1, 7, 50]),
    seed=st.integers(0, 1000),
    cuts=st.lists(st.floats(0, 1), max_size=4),
)
def test_an_epoch_is_a_permutation_however_it_is_read(sizes, block_shards, window, seed, cuts):
    sizes = [[*shards, 1] for shards in sizes]
    orders = [SourceOrder(np.array(shards), seed + i, block_shards, window) for i, shards in enumerate(sizes)]
    order = MixtureOrder(orders, [sum(shards) for shards in sizes], seed)
    for epoch in (0, 3):
        whole, passes = order.read(epoch, 0, order.size)
        np.testing.assert_array_equal(np.sort(whole), np.arange(order.size))
        assert (passes == epoch).all()
        bounds = [0, *sorted(int(cut * order.size) for cut in cuts), order.size]
        parts = [order.read(epoch, low, high)[0] for low, high in zip(bounds, bounds[1:])]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_shards_are_read_a_block_at_a_time():
    order = SourceOrder(np.full(100, 50), 0, 8, 0)
    ids = order.ids(np.arange(5000), 0)
    for block in ids[:4800].reshape(-1, 400):
        assert len(np.unique(block // 50)) == 8
    assert not np.array_equal(np.unique(ids[:400] // 50), np.arange(8))


def test_weights_and_epochs_of_a_mixture_are_kept_exactly():
    rng = np.random.default_rng(0)
    tables = [make_index(rng, number) for number in (3000, 1000, 500)]
    mixture = Mixture([Source(index=tables[0], weight=1.0), Source(index=tables[1], weight=2.0, epochs=2.0)])
    assert mixture.per_epoch == [1000, 2000]  # the small source has come twice: the epoch is over
    planner = make_planner(mixture)
    seen = [ids_of(packs_of(planner, epoch)) for epoch in range(3)]
    for ids in seen:
        assert (ids < 3000).sum() == 1000
        np.testing.assert_array_equal(np.bincount(ids[ids >= 3000] - 3000), np.full(1000, 2))
    large = np.concatenate(seen)
    np.testing.assert_array_equal(np.sort(large[large < 3000]), np.arange(3000))  # goes on where it stopped
    shares = [(part < 3000).mean() for part in np.array_split(seen[0], 6)[:-1]]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.08)  # evenly over the epoch

    thrice = Mixture([Source(index=tables[2], epochs=3.0), Source(index=tables[1], epochs=0.5)])
    ids = ids_of(packs_of(make_planner(thrice)))
    np.testing.assert_array_equal(np.bincount(ids[ids < 500]), np.full(500, 3))
    assert len(ids[ids >= 500]) == len(np.unique(ids[ids >= 500])) == 500


def test_a_sample_that_comes_again_draws_anew():
    mixture = Mixture([Source(index=make_index(np.random.default_rng(0), 600, text_share=0), epochs=2.0)])
    packs = packs_of(make_planner(mixture))
    counts = {}
    for pack in packs:
        for sample, count in zip(pack.sample_ids, pack.counts):
            counts.setdefault(int(sample), []).append(int(count))
    assert np.mean([len(set(both)) for both in counts.values()]) > 1.5


def test_a_mixture_with_one_weight_missing_or_nothing_in_it_is_refused():
    table = make_index(np.random.default_rng(0), 10)
    with pytest.raises(UserError, match="b: has no weight but other sources"):
        Mixture([Source(index=table, weight=1.0, name="a"), Source(index=table, name="b")])
    with pytest.raises(UserError, match="c: holds no sample"):
        Mixture([Source(index=make_index(np.random.default_rng(0), 0), name="c")])


def test_policies_are_per_source():
    rng = np.random.default_rng(0)
    clean, long = make_index(rng, 100), make_index(rng, 100)
    long.text_tokens[3] = 4000
    Mixture([Source(index=clean)])
    sources = [Source(index=clean), Source(index=long, over_long="drop")]
    assert 103 not in ids_of(packs_of(make_planner(Mixture(sources))))
    with pytest.raises(UserError, match="sample 3 has up to"):
        make_planner(Mixture([Source(index=clean), Source(index=long)]))


def test_a_schedule_moves_the_counts_over_the_epoch():
    index = make_index(np.random.default_rng(0), 4000, text_share=0)
    planner = make_planner(index, counts=(4, 36), schedule=((0, (1.0, 0.0)), (4000, (0.0, 1.0))), shuffle_window=50)
    packs = packs_of(planner)
    counts = np.concatenate([pack.counts for pack in packs])
    assert (counts[:300] == 4).mean() > 0.6 and (counts[-300:] == 36).mean() > 0.8


@pytest.mark.parametrize("mixing, digest", [("lockstep", "a303e69a3a4bb401"), ("free", "4c6ab51ed5933d55")])
def test_the_version_stands_for_these_plans(mixing, digest):
    """A change of the planner that moves a sample must raise PLANNER_VERSION, and then change this."""
    planner = make_planner(make_index(np.random.default_rng(0), 3000), mixing=mixing)
    whole = hashlib.sha256("".join(step.digest() for epoch in (0, 1) for step in planner.epoch_steps(epoch)).encode())
    assert (PLANNER_VERSION, whole.hexdigest()[:16]) == (2, digest)
