"""Laws of a total: what the plan gives a sample is what the processor gives a prompt, to the token, however it is shared."""

import numpy as np
import pytest
import torch
from conftest import train_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from image_shards import conversation, encoded, write_shard

from tokenflex.budget import VisualTokenBudget
from tokenflex.config import BudgetConfig, DataConfig
from tokenflex.data import Limits, PackDataset, load_or_build_index
from tokenflex.data.loader import micro_batches
from tokenflex.errors import UserError
from tokenflex.infer import Generator
from tokenflex.model import TokenFlexProcessor, build_model, build_processor
from tokenflex.model.pooling import sides_of
from tokenflex.model.sharing import counts_by_size, even_count
from tokenflex.plan import LengthTable, Mixture, Planner, Source
from tokenflex.train.objective import model_inputs

TRAINED = (4, 12, 20)
TOTAL = 50
GRID = (6, 8)
NUMBERS = [1, 2, 3, 5, 0, 12]
"""Images of the samples below: 20 + 20 fit a total of 50, 3 and 4 images get 12, 5 to 12 images 4."""


@given(
    trained=st.sets(st.integers(1, 300), min_size=1, max_size=6),
    total=st.integers(1, 3000),
    tiles=st.lists(st.integers(1, 60), min_size=1, max_size=10),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_the_plans_rule_is_the_processors(trained, total, tiles, data):
    budget = VisualTokenBudget(counts=tuple(trained), probabilities=(1 / len(trained),) * len(trained), total=total)
    drawn = np.array([data.draw(st.sampled_from(sorted(trained))) for _ in tiles])
    planned = budget.within_total(drawn, np.array(tiles))
    for count, number, own in zip(drawn.tolist(), tiles, planned.tolist()):
        if number > budget.most_tiles:
            with pytest.raises(ValueError, match=f"total_visual_tokens={total}: {number} images"):
                even_count(count, sorted(trained), number, total)
            continue
        assert own == even_count(count, sorted(trained), number, total) and own <= count and own * number <= total
        larger = [other for other in trained if own < other <= count]
        assert all(other * number > total for other in larger)


def test_without_a_total_nothing_changes():
    budget = VisualTokenBudget(counts=TRAINED, probabilities=(0.2, 0.3, 0.5))
    assert budget.within_total(np.array([20, 4]), np.array([900, 0])).tolist() == [20, 4]
    assert budget.most_tiles == float("inf")


@given(
    count=st.integers(1, 256),
    areas=st.lists(st.integers(1, 10**7), min_size=1, max_size=12),
    grid=st.tuples(st.integers(2, 30), st.integers(2, 30)),
)
@settings(max_examples=200, deadline=None)
def test_by_size_the_sum_is_the_even_one_and_larger_images_get_no_less(count, areas, grid):
    counts = counts_by_size(count, areas, grid)
    rows, columns = sides_of(count, grid)
    assert sum(counts) == count * len(areas)
    assert all(own % columns == 0 and own >= max(1, rows // 4) * columns for own in counts)
    assert all(own // columns <= max(rows, grid[0]) for own in counts)
    for one, its in zip(areas, counts):
        assert all(its <= other_count for other, other_count in zip(areas, counts) if other > one)
    assert counts_by_size(count, [7] * 5, grid) == [count] * 5


def test_known_shares_by_size():
    assert counts_by_size(64, [100, 100], (27, 27)) == [64, 64]
    assert counts_by_size(64, [300, 100], (27, 27)) == [96, 32]
    assert counts_by_size(64, [10**6, 1], (27, 27)) == [112, 16]  # a quarter is left to the smallest
    assert counts_by_size(144, [10**6, 1, 1], (27, 27)) == [324, 60, 48]  # 27 rows at the most


@pytest.mark.parametrize(
    "change, why",
    [
        ({"total": 3}, "total=3 holds no image at any of the counts"),
        ({"share": "size"}, "share=size shares a total, and there is none"),
        ({"total": 512, "per_sample": "all"}, "total=512 with per_sample=all"),
        ({"total": -1}, "total"),
        ({"total": 512, "share": "router"}, "share"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(change, why):
    with pytest.raises(ValueError, match=why):
        BudgetConfig(num_visual_tokens=(4, 12), probabilities=(0.5, 0.5), **change)


def test_tiles_and_shares_by_size_exclude_each_other(tiny_config):
    model = tiny_config.model.model_copy(update={"max_tiles": 6})
    budget = tiny_config.budget.model_copy(update={"total": TOTAL, "share": "size"})
    with pytest.raises(UserError, match="budget.share=size with model.max_tiles=6"):
        build_processor(model, budget)


@pytest.fixture(scope="module", params=["even", "size"])
def shared(request, tiny_config):
    """(recipe, processor) with a total."""
    budget = {"num_visual_tokens": TRAINED, "probabilities": [0.2, 0.3, 0.5], "total": TOTAL, "share": request.param}
    config = tiny_config.model_copy(update={"budget": BudgetConfig(**budget)})
    return config, build_processor(config.model, config.budget)


@pytest.fixture(scope="module")
def photos():
    shapes = [(64, 48), (200, 150), (32, 20), (90, 90)]
    return [[encoded(*shapes[(number + i) % 4]) for i in range(number)] for number in NUMBERS]


@pytest.fixture(scope="module")
def shared_index(photos, shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    write_shard(folder / "s.tar", photos)
    return load_or_build_index([folder / "s.tar"], shared[1], folder / "index", Limits())


@pytest.fixture(scope="module")
def planned(shared, shared_index):
    """[(plan, batch)] of two epochs, one pack a step."""
    config, processor = shared
    data = config.data.model_copy(update={"packs_per_step": 1, "lockstep_packs": 1, "pack_length": 250})
    planner = Planner(shared_index, VisualTokenBudget.of(config.budget), data, 3, "sqrt")
    dataset = PackDataset(shared_index, processor, "sqrt", 4, Limits())
    steps = [step for epoch in range(2) for step in planner.epoch_steps(epoch)]
    return [(plan, dataset.batch(plan)) for plan in micro_batches(steps, 0, 1, 1) if len(plan.sample_ids)]


def test_planned_lengths_are_collated_lengths_and_the_processors(shared, shared_index, planned, photos):
    config, processor = shared
    seen = set()
    for plan, batch in planned:
        assert not batch.skipped
        tiles = shared_index.num_tiles[plan.sample_ids].astype(np.int64)
        lengths = batch.cu_seq_lens.diff().numpy()
        np.testing.assert_array_equal(lengths, shared_index.text_tokens[plan.sample_ids] + plan.counts * tiles)
        assert (plan.counts * tiles <= TOTAL).all()
        sides = iter(batch.tile_sides)
        for number, count, length in zip(plan.sample_ids.tolist(), plan.counts.tolist(), lengths.tolist()):
            own = [next(sides) for _ in photos[number]]
            seen.add((len(own), count, len(set(own)) > 1))
            if not own:
                continue
            options = {"num_visual_tokens": count, "total_visual_tokens": TOTAL}
            inputs = processor.apply_chat_template(conversation(number, photos[number]), tokenize=True, **options)
            assert inputs["input_ids"].shape[1] == length
            assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "num_tiles"}
            assert sum(rows * columns for rows, columns in own) == count * len(own)
    assert {number for number, _, _ in seen} == set(NUMBERS)
    assert max(count for number, count, _ in seen if number == 3) <= 12 and {4} == {c for n, c, _ in seen if n > 4}
    assert any(is_mixed for _, _, is_mixed in seen) == (config.budget.share == "size")


def test_packed_logits_equal_unpacked_logits_under_a_total(shared, planned, photos):
    config, processor = shared
    torch.manual_seed(1)
    model = build_model(config.model, config.budget, processor, torch.float32).eval()
    for plan, batch in planned[:4]:
        with torch.no_grad():
            model.language_model.set_attn_implementation("tokenflex_packed")
            packed = model(**model_inputs(batch, processor.image_processor.normalised)).logits[0]
            model.language_model.set_attn_implementation("sdpa")
            for place, (number, count) in enumerate(zip(plan.sample_ids.tolist(), plan.counts.tolist())):
                options = {"num_visual_tokens": count, "total_visual_tokens": TOTAL} if count else {}
                inputs = processor.apply_chat_template(conversation(number, photos[number]), tokenize=True, **options)
                alone = model(**inputs, use_cache=False).logits[0]
                begin, end = batch.cu_seq_lens[place : place + 2]
                torch.testing.assert_close(packed[begin:end], alone, rtol=1e-4, atol=2e-5)


def test_a_bad_sample_leaves_its_planned_length(shared, shared_index, photos):
    config, processor = shared
    dataset = PackDataset(shared_index, processor, "sqrt", 4, Limits(max_image_pixels=5000))
    (view,) = dataset.prepared(2, 12)
    assert view.problem is not None and len(view.input_ids) == int(shared_index.text_tokens[2]) + 36
    assert sum(rows * columns for rows, columns in view.sides) == len(view.visual) == 36


def test_a_prompt_without_counts_has_the_total_of_training(shared, photos):
    """Each conversation of a batch its own; a named count is every image's, and a total may be lifted."""
    config, processor = shared
    runs = lambda inputs: (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()  # noqa: E731
    talks = [conversation(number, photos[number]) for number in (1, 3, 2)]
    assert runs(processor.apply_chat_template(talks, tokenize=True)) == [40, 20, 36]
    assert runs(processor.apply_chat_template(talks, tokenize=True, num_visual_tokens=20)) == [40, 100, 60]
    assert runs(processor.apply_chat_template(talks, tokenize=True, total_visual_tokens=0)) == [40, 100, 60]
    prompts = processor.apply_chat_template(talks)
    flat = [image for number in (1, 3, 2) for image in photos[number]]
    assert runs(processor(images=flat, text=prompts, total_visual_tokens=25)) == [24, 20, 12]


@pytest.mark.parametrize(
    "options, why",
    [
        ({"total_visual_tokens": 19}, "total_visual_tokens=19: 5 images .* have 20 visual tokens at the least, 4 each"),
        ({"total_visual_tokens": -5}, "total_visual_tokens is -5"),
        ({"total_visual_tokens": True}, "total_visual_tokens is True"),
        ({"total_visual_tokens": 512, "share": "fair"}, "share is 'fair'; it must be one of even, size"),
        ({"share": "even", "num_visual_tokens": 4}, "share='even' is of a total, and there is none"),
        (
            {"total_visual_tokens": 50, "num_visual_tokens": [12, 12, 12, 12, 4]},
            "come to 52 visual tokens in a prompt, more than total_visual_tokens=50",
        ),
    ],
)
def test_totals_that_do_not_fit_are_refused_in_one_line(shared, photos, options, why):
    with pytest.raises(ValueError, match=why) as refused:
        shared[1].apply_chat_template(conversation(3, photos[3]), tokenize=True, **options)
    assert "\n" not in str(refused.value)


def test_own_counts_that_fit_are_taken_as_they_are(shared, photos):
    own = {"num_visual_tokens": [12, 12, 12, 10, (2, 2)], "total_visual_tokens": 50}
    inputs = shared[1].apply_chat_template(conversation(3, photos[3]), tokenize=True, **own)
    assert (inputs["input_ids"] == shared[1].image_token_id).sum() == 50


def planner_of(over_long, total=TOTAL, tiles=(2, 13, 1)):
    table = LengthTable(text=np.array([10] * len(tiles)), tiles=np.array(tiles), name="some.tar")
    data = DataConfig(pack_length=200, max_images_per_pack=40, packs_per_step=1, lockstep_packs=1, over_long=over_long)
    budget = VisualTokenBudget(counts=TRAINED, probabilities=(0.0, 0.0, 1.0), total=total)
    return Planner(table, budget, data, 0, "sqrt")


def test_a_sample_that_no_count_fits_is_refused_by_name_or_left_out():
    with pytest.raises(
        UserError, match=r"some.tar: sample 1 has 13 images .* budget.total=50 holds 12 at 4 visual tokens"
    ):
        planner_of("error")
    planner = planner_of("drop")
    packs = [pack for step in planner.epoch_steps(0) for pack in step.packs]
    assert sorted(i for pack in packs for i in pack.sample_ids.tolist()) == [0, 2]
    assert planner.dropped.numbers == {"longer than a pack": 1}
    assert {(i, c) for p in packs for i, c in zip(p.sample_ids.tolist(), p.counts.tolist())} == {(0, 20), (2, 20)}


def test_a_pack_need_not_hold_what_a_total_forbids():
    """20 x 10 tokens would fit no pack of 200 with their text; under the total there are 40."""
    with pytest.raises(UserError, match="has up to 210 tokens"):
        planner_of("error", total=0, tiles=(2, 10))
    planner = planner_of("error", tiles=(2, 10))
    packs = [pack for step in planner.epoch_steps(0) for pack in step.packs]
    assert {(i, c) for p in packs for i, c in zip(p.sample_ids.tolist(), p.counts.tolist())} == {(0, 20), (1, 4)}


def test_a_conversation_is_cut_where_its_images_fit_the_total(processor, tmp_path):
    def two_turns(number, images, has_bytes):
        return [message for some in (images[:1], images[1:]) for message in conversation(number, some, has_bytes)]

    write_shard(tmp_path / "s.tar", [[encoded(20, 20)] * 3, [encoded(20, 20)] * 2], two_turns)
    index = load_or_build_index([tmp_path / "s.tar"], processor, tmp_path / "index", Limits())
    data = DataConfig(pack_length=4000, packs_per_step=1, lockstep_packs=1)
    budget = VisualTokenBudget(counts=TRAINED, probabilities=(0.0, 0.0, 1.0), total=11)
    planner = Planner(Mixture([Source(index=index, over_long="truncate")]), budget, data, 0, "sqrt")
    dataset = PackDataset(index, processor, "sqrt", 4, Limits())
    (plan,) = [plan for plan in micro_batches(planner.epoch_steps(0), 0, 1, 1) if len(plan.sample_ids)]
    found = zip(plan.sample_ids.tolist(), plan.counts.tolist(), plan.num_messages.tolist())
    assert sorted(found) == [(0, 4, 2), (1, 4, 0)]
    batch = dataset.batch(plan)
    assert not batch.skipped and len(batch.images) == 3 and len(batch.visual_positions) == 12


def test_a_run_with_rectangles_and_a_total_hands_both_to_its_export(tmp_path, cache_dir, tiny_config):
    budget = ["budget.sides=aspect", "budget.total=16", "budget.share=size"]
    train_ranks(1, tmp_path, cache_dir, *budget, "train.num_steps=2", "evaluate.at_end=true")
    folder = tmp_path / "tiny" / "model"
    processor = TokenFlexProcessor.from_pretrained(folder)
    assert (processor.total_visual_tokens, processor.share, processor.image_processor.sides) == (16, "size", "aspect")
    generator = Generator(folder)
    images = [encoded(90, 30), encoded(30, 30)]
    talk = conversation(0, images)[:1]
    for options, visual in (((), 8), ((None, None, 24), 24), ((12,), 24)):
        inputs = generator.inputs(talk, *options)
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == visual
        generator.model.generate(**inputs, max_new_tokens=2)
