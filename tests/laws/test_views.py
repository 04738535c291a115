"""Laws of samples that are seen at several counts side by side: planned whole, one pass of the encoder, as if seen apart."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_kernels_pool_the_same
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.budget import VisualTokenBudget
from tokenflex.config import BudgetConfig, DataConfig
from tokenflex.data import Limits, PackDataset
from tokenflex.data.loader import MicroBatchPlan, micro_batches
from tokenflex.errors import UserError
from tokenflex.plan import LOSS_WEIGHTS, Planner, Position
from tokenflex.plan.table import LengthTable
from tokenflex.train.consistency import Consistency
from tokenflex.train.objective import Objective

KINDS = ("one", "all", "largest_and_one")
COUNTS = (4, 12, 25)


def budget_of(kind, counts=COUNTS, **section):
    section = {"probabilities": (1,) * len(counts), **section}
    return VisualTokenBudget.of(BudgetConfig(num_visual_tokens=counts, per_sample=kind, **section))


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_a_draw(kind):
    counts = budget_of(kind).draw(0, 1, np.arange(3000), np.zeros(3000))
    drawn = {"one": {4, 12, 25}, "all": {4}, "largest_and_one": {4, 12}}[kind]
    assert set(counts) == drawn
    for count in drawn:
        views = budget_of(kind).views(count)
        assert len(views) == budget_of(kind).num_views == {"one": 1, "all": 3, "largest_and_one": 2}[kind]
        assert views[0] == (count if kind == "one" else 25) and count in views
        assert budget_of(kind).visual_tokens(np.array([count, 0])).tolist() == [sum(views), 0]
    assert budget_of(kind).views(0) == (0,)


def test_the_smaller_counts_keep_their_proportion():
    budget = budget_of(
        "largest_and_one", probabilities=(0.1, 0.3, 0.6), schedule=((0, (0.1, 0.3, 0.6)), (9, (1, 0, 0)))
    )
    assert budget.probabilities == pytest.approx((0.25, 0.75))
    np.testing.assert_allclose(budget.probabilities_at([0, 9]), [[0.25, 0.75], [1, 0]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixing", ["lockstep", "free"])
@given(seed=st.integers(0, 2**16))
@settings(max_examples=8, deadline=None)
def test_packs_hold_all_views_and_every_sample_comes_once(kind, mixing, seed):
    rng = np.random.default_rng(seed)
    index = LengthTable(
        text=rng.integers(10, 100, 400),
        tiles=np.where(rng.random(400) < 0.2, 0, rng.integers(1, 4, 400)),
        learned=rng.integers(1, 9, 400),
        name="some.tar",
    )
    data = DataConfig(pack_length=900, max_images_per_pack=8, packs_per_step=8, lockstep_packs=4, mixing=mixing)
    budget = budget_of(kind)
    ids, weight = [], 0.0
    for step in Planner(index, budget, data, seed, "sqrt").epoch_steps(0):
        weight += step.total_weight
        for pack in step.packs:
            text, tiles = index.text[pack.sample_ids], index.tiles[pack.sample_ids]
            views = [len(budget.views(count)) for count in pack.counts]
            visual = [sum(budget.views(count)) for count in pack.counts]
            assert (text * views + tiles * visual).sum() <= 900 and tiles.sum() <= 8
            assert ((pack.counts == 0) == (tiles == 0)).all()
            ids += pack.sample_ids.tolist()
    assert sorted(ids) == list(range(400))
    per_sample = index.learned * LOSS_WEIGHTS["sqrt"](index.learned) * np.where(index.tiles > 0, budget.num_views, 1)
    assert weight == pytest.approx(per_sample.sum())


def test_what_is_too_long_counts_every_view():
    index = LengthTable(text=np.array([30] * 20), tiles=np.array([1] * 20), name="some.tar")

    def plan(kind, length):
        data = DataConfig(pack_length=length, packs_per_step=2, lockstep_packs=1)
        return Planner(index, budget_of(kind), data, 0, "sqrt")

    plan("one", 55), plan("all", 131), plan("largest_and_one", 97)
    for kind, length in (("one", 54), ("all", 130), ("largest_and_one", 96)):
        with pytest.raises(UserError, match=f"has up to {length + 1} tokens and 1 images, a pack holds {length}"):
            plan(kind, length)
    with pytest.raises(UserError, match="a pack holds no image of 41 visual tokens in 3 views"):
        plan("all", 43)


def test_a_conversation_is_cut_where_all_its_views_fit(index):
    cut = next(i for i in range(len(index)) if len(index._cuts_of(i)) > 1 and index._cuts_of(i)[0, 4])
    cuts = index._cuts_of(cut)
    _, messages, text, learned, tiles = cuts[-1].tolist()
    exact = 3 * text + tiles * 41
    assert index.cut(cut, 41, exact, 8, 3) == (messages, text, learned, tiles)
    shorter = index.cut(cut, 41, exact - 1, 8, 3)
    assert shorter is None or 3 * shorter[1] + shorter[3] * 41 < exact


@pytest.fixture
def in_views(index, processor):
    """One batch of samples with no, one and two images, each seen at 25 and another count, and the same views apart."""
    budget = VisualTokenBudget(counts=(4, 12), probabilities=(0.5, 0.5), others=(25,))
    ids = np.concatenate([np.flatnonzero(index.num_images == n)[:2] for n in (1, 0, 2)])
    counts = np.where(index.num_images[ids] > 0, np.resize([4, 12], len(ids)), 0)
    dataset = PackDataset(index, processor, "sqrt", 4, Limits(), budget.views)
    together = dataset.batch(MicroBatchPlan(Position(), True, ids, counts, 7.0))
    alone = PackDataset(index, processor, "sqrt", 4, Limits())
    apart = [
        alone.batch(MicroBatchPlan(Position(), True, np.array([i]), np.array([view]), 7.0))
        for i, count in zip(ids, counts)
        for view in budget.views(int(count))
    ]
    return together, apart


def test_views_in_one_pack_answer_and_learn_as_views_apart(model, processor, in_views):
    together, apart = in_views
    images = []
    hook = model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: images.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    objective = Objective(model, processor.image_processor.normalised)
    objective(together).total.backward()
    hook.remove()
    assert images == [6] == [len(together.images)]  # of 12 tiles that are pooled
    assert len(together.tile_counts) == len(together.tile_index) == 12 and len(together.sample_ids) == 6
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = 0.0
    for batch in apart:
        loss = objective(batch).total
        loss.backward()
        total += loss.item()
    with torch.no_grad():
        assert objective(together).total.item() == pytest.approx(total, abs=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=2e-6, msg=name)


def test_the_kernels_pool_the_same_views(model, processor, in_views):
    together, _ = in_views
    assert_kernels_pool_the_same(model, processor.image_processor.normalised, together, together.tile_counts)


def test_consistency_is_the_divergence_from_the_largest_count(model, processor, in_views):
    together, apart = in_views
    normalise = processor.image_processor.normalised
    loss = Objective(model, normalise, terms=[Consistency(0.5)])(together)
    with torch.no_grad():
        logits = [Objective(model, normalise).token_losses(batch)[0].logits[0].float() for batch in apart]
    wanted = 0.0
    views = iter(zip(apart, logits))
    for batch, teacher in views:
        if batch.is_dummy_image:
            continue
        _, student = next(views)
        divergence = (F.softmax(teacher, -1) * (F.log_softmax(teacher, -1) - F.log_softmax(student, -1))).sum(-1)
        wanted += 0.5 * float((divergence * batch.weights).sum()) / 7.0
    assert float(loss.parts["consistency"]) == pytest.approx(wanted, rel=1e-4) and wanted > 1e-6


def test_the_teacher_is_not_taught(model, processor, in_views):
    """Its logits have no gradient from the term; a batch without views has the term at an exact zero."""
    together, apart = in_views
    outputs, _ = Objective(model, processor.image_processor.normalised).token_losses(together)
    outputs.logits.retain_grad()
    Consistency(1.0)(outputs, together).backward()
    moved = outputs.logits.grad[0].abs().sum(-1) > 0
    assert not moved[together.teacher < 0].any() and moved[together.teacher >= 0].all()
    outputs, _ = Objective(model, processor.image_processor.normalised).token_losses(apart[0])
    assert Consistency(1.0)(outputs, apart[0]).item() == 0


def test_a_bad_sample_has_a_substitute_in_every_view(index, processor, monkeypatch):
    budget = VisualTokenBudget(counts=(4,), probabilities=(1.0,), others=(25, 12))
    dataset = PackDataset(index, processor, "sqrt", 4, Limits(max_image_pixels=1), budget.views)
    i = int(np.flatnonzero(index.num_images == 2)[0])
    batch = dataset.batch(MicroBatchPlan(Position(), True, np.array([i]), np.array([4]), 1.0))
    assert len(batch.skipped) == 1 and batch.skipped[0]["sample"] == i and not len(batch.targets)
    tiles = int(index.num_tiles[i])
    assert batch.input_ids.shape[1] == 3 * index.text_tokens[i] + tiles * (4 + 12 + 25) and len(batch.images) == tiles


def test_a_step_in_views_is_the_same_on_any_split(tiny_config, model, processor, index):
    budget = VisualTokenBudget(counts=(4,), probabilities=(1.0,), others=(12,))
    data = tiny_config.data.model_copy(update={"pack_length": 3 * tiny_config.data.pack_length})
    step = next(Planner(index, budget, data, 3, "sqrt").steps_from(Position()))
    dataset = PackDataset(index, processor, "sqrt", 4, Limits(), budget.views)
    objective = Objective(model, processor.image_processor.normalised, terms=[Consistency(0.3)])
    totals = []
    for share in (len(step.packs), 1):
        with torch.no_grad():
            batches = [dataset.batch(plan) for plan in micro_batches([step], 0, 1, share)]
            totals.append(sum(objective(batch).total.item() for batch in batches))
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"num_visual_tokens": [9], "probabilities": [1], "per_sample": "all"}, "with the one count 9; give several"),
        ({"per_sample": "all", "schedule": [[5, [1, 1, 1]]]}, "draws nothing, so a schedule has no meaning"),
        ({"per_sample": "largest_and_one", "probabilities": [0, 0, 1]}, "draws among the counts below 256"),
        ({"per_sample": "both"}, "'one', 'all' or 'largest_and_one'"),
    ],
)
def test_views_that_cannot_be_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        BudgetConfig(**section)
