"""Laws of sides by aspect: an equal count, so equal lengths; one shape in training, in the processor and at inference."""

import io
import math

import numpy as np
import pytest
import torch
from conftest import assert_kernels_pool_the_same
from hypothesis import given, settings
from hypothesis import strategies as st
from image_shards import conversation, encoded, write_shard
from PIL import Image

from tokenflex.budget import VisualTokenBudget
from tokenflex.config import BudgetConfig
from tokenflex.data import Limits, PackDataset, load_or_build_index
from tokenflex.data.index import fingerprint
from tokenflex.data.loader import micro_batches
from tokenflex.export import export_model
from tokenflex.model import TokenFlexConfig, TokenFlexImageProcessor, TokenFlexProcessor, build_model, build_processor
from tokenflex.model.pooling import aspect_sides, sides_of, tile_sides
from tokenflex.plan import Planner
from tokenflex.train.objective import model_inputs

SHAPES = [(256, 40), (40, 256), (90, 90), (300, 200), (7, 350)]
"""Width and height of the images of the samples below."""


def test_known_rectangles():
    """A square, a wide page, a column, and counts that have no other rectangle within the patches."""
    grid = (27, 27)
    assert [aspect_sides(64, size, grid) for size in ((9, 9), (100, 400), (400, 100))] == [(8, 8), (4, 16), (16, 4)]
    assert [aspect_sides(144, (1, width), grid) for width in (1, 2, 4, 40)] == [(12, 12), (8, 18), (6, 24), (6, 24)]
    assert aspect_sides(49, (1, 9), grid) == (7, 7)  # 1 x 49 has more columns than there are patches
    assert aspect_sides(31, (1, 9), grid) == sides_of(31, grid) == (1, 31)  # a prime above them is as it was
    assert aspect_sides((2, 3), (1, 9), grid) == (2, 3)


@given(
    count=st.integers(1, 700),
    size=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    grid=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
@settings(max_examples=300, deadline=None)
def test_the_rectangle_has_the_count_and_is_the_nearest_that_fits_the_patches(count, size, grid):
    rows, columns = aspect_sides(count, size, grid)
    assert rows * columns == count
    fits = [(n, count // n) for n in range(1, grid[0] + 1) if count % n == 0 and count // n <= grid[1]]
    if not fits:
        assert (rows, columns) == sides_of(count, grid)
        return
    gap = lambda side: abs(math.log(side[0] / side[1]) - math.log(size[0] / size[1]))  # noqa: E731
    assert (rows, columns) in fits and gap((rows, columns)) <= min(map(gap, fits)) + 1e-8


def test_other_sides_are_refused_by_name():
    with pytest.raises(ValueError, match="sides is 'wide'"):
        TokenFlexImageProcessor(8, 8, sides="wide")
    with pytest.raises(ValueError, match="sides is 'wide'"):
        TokenFlexConfig(sides="wide")
    with pytest.raises(ValueError, match="sides"):
        BudgetConfig(sides="wide")


@pytest.fixture(scope="module", params=[1, 6], ids=["whole", "tiled"])
def aspect(request, tiny_config):
    """(recipe, processor) with sides by aspect, with images whole and tiled."""
    model = tiny_config.model.model_copy(update={"max_tiles": request.param})
    config = tiny_config.model_copy(
        update={"model": model, "budget": tiny_config.budget.model_copy(update={"sides": "aspect"})}
    )
    return config, build_processor(config.model, config.budget)


@pytest.fixture(scope="module")
def photos():
    """Images of four samples: one each, two together, none, and one that its EXIF turns."""
    wide, tall, square, page, column = (encoded(*shape) for shape in SHAPES)
    return [[wide], [tall, square], [], [encoded(640, 160, "JPEG", 6)], [page, column]]


@pytest.fixture(scope="module")
def aspect_index(aspect, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aspect")
    write_shard(folder / "s.tar", photos)
    return load_or_build_index([folder / "s.tar"], aspect[1], folder / "index", Limits())


@pytest.fixture(scope="module")
def aspect_batches(aspect, aspect_index):
    """Every sample as planned: [(plan, batch)] of an epoch at each count."""
    config, processor = aspect
    data = config.data.model_copy(update={"packs_per_step": 1, "lockstep_packs": 1, "max_images_per_pack": 40})
    dataset = PackDataset(aspect_index, processor, "sqrt", 4, Limits())
    found = []
    for count in (4, 12):
        planner = Planner(aspect_index, VisualTokenBudget(counts=(count,), probabilities=(1.0,)), data, 0, "sqrt")
        found += [(plan, dataset.batch(plan)) for plan in micro_batches(planner.epoch_steps(0), 0, 1, 1)]
    return [(plan, batch) for plan, batch in found if len(plan.sample_ids)]


def test_lengths_do_not_hang_on_sides(aspect, aspect_index, aspect_batches, tiny_config):
    config, processor = aspect
    square = build_processor(config.model, tiny_config.budget)
    assert fingerprint(square) == fingerprint(processor)
    assert sorted(i for plan, _ in aspect_batches for i in plan.sample_ids.tolist()) == sorted([*range(5)] * 2)
    for plan, batch in aspect_batches:
        expected = aspect_index.text_tokens[plan.sample_ids] + plan.counts * aspect_index.num_tiles[plan.sample_ids]
        np.testing.assert_array_equal(batch.cu_seq_lens.diff().numpy(), expected)
        assert not batch.skipped and [a * b for a, b in batch.tile_sides] == batch.tile_counts


def test_training_and_the_processor_shape_each_tile_alike(aspect, photos, aspect_batches):
    config, processor = aspect
    seen = set()
    for plan, batch in aspect_batches:
        shown = [(data, int(count)) for i, count in zip(plan.sample_ids, plan.counts) for data in photos[i]]
        if not shown:
            continue
        inputs = processor.image_processor([data for data, _ in shown])
        assert torch.equal(inputs["pixel_values"], processor.image_processor.normalised(batch.images))
        sizes = iter(inputs["tile_sizes"].tolist())
        sides = [
            side
            for (_, count), number in zip(shown, inputs["num_tiles"].tolist())
            for side in tile_sides(count, [next(sizes) for _ in range(number)], processor.patch_grid, "aspect")
        ]
        assert sides == batch.tile_sides
        seen |= set(sides)
    assert {(2, 6), (6, 2), (3, 4)} <= seen if config.model.max_tiles == 1 else len(seen) > 3


def test_a_size_is_that_of_the_upright_image_whatever_it_comes_as(aspect, tmp_path):
    images, (width, height) = aspect[1].image_processor, (960, 240)
    data = encoded(width, height, "JPEG", 6)  # decoded at a smaller scale, and turned
    (tmp_path / "a.jpg").write_bytes(data)
    for image in (data, str(tmp_path / "a.jpg"), Image.open(io.BytesIO(data))):
        assert images(image)["tile_sizes"].tolist() == images.tile_sizes(height, width).tolist()
    assert images.tile_sizes(height, width)[-1].tolist() == [width, height]


@pytest.fixture(scope="module")
def aspect_model(aspect):
    torch.manual_seed(1)
    config, processor = aspect
    return build_model(config.model, config.budget, processor, torch.float32).eval()


def test_packed_logits_equal_unpacked_logits(aspect, aspect_model, photos, aspect_batches):
    model, (_, processor) = aspect_model, aspect
    for plan, batch in aspect_batches:
        with torch.no_grad():
            model.language_model.set_attn_implementation("tokenflex_packed")
            packed = model(**model_inputs(batch, processor.image_processor.normalised)).logits[0]
            model.language_model.set_attn_implementation("sdpa")
            for place, (number, count) in enumerate(zip(plan.sample_ids.tolist(), plan.counts.tolist())):
                inputs = processor.apply_chat_template(
                    conversation(number, photos[number]), tokenize=True, num_visual_tokens=count or None
                )
                alone = model(**inputs, use_cache=False).logits[0]
                begin, end = batch.cu_seq_lens[place : place + 2]
                torch.testing.assert_close(packed[begin:end], alone, rtol=1e-4, atol=2e-5)


def test_the_kernels_pool_the_same_rectangles(aspect, aspect_model, aspect_batches):
    model, (_, processor) = aspect_model, aspect
    model.language_model.set_attn_implementation("tokenflex_packed")
    batch = max((batch for _, batch in aspect_batches), key=lambda batch: len(batch.tile_sides))
    assert_kernels_pool_the_same(model, processor.image_processor.normalised, batch, batch.tile_sides)


def test_generation_shapes_a_count_by_the_image(aspect, aspect_model, photos):
    """Also from features, for beams, and at counts that the prompt was not built with; a pair is taken as it is."""
    model, (_, processor) = aspect_model, aspect
    model.language_model.set_attn_implementation("sdpa")
    ask = (
        lambda count: processor.apply_chat_template(  # noqa: E731
            conversation(0, photos[1])[:1], tokenize=True, add_generation_prompt=True, num_visual_tokens=count
        )
    )
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answer = lambda inputs, **more: model.generate(**inputs, **options, **more)[:, inputs["input_ids"].shape[1] :]  # noqa: E731
    built = answer(ask([12, 4]))
    assert torch.equal(answer(ask(4), num_visual_tokens=[12, 4]), built)
    features = {**ask([12, 4]), "pixel_values": model.encode_images(ask(4)["pixel_values"])}
    assert torch.equal(answer(features), built)
    assert torch.equal(answer(features, num_beams=2, num_return_sequences=2)[:1], answer(ask([12, 4]), num_beams=2))
    rows = ask([12, 4])
    as_pairs = model.get_image_features(rows["pixel_values"], [12, 4], rows["num_tiles"], tile_sizes=rows["tile_sizes"])
    shown = processor(
        images=photos[1],
        text=processor.apply_chat_template(conversation(0, photos[1])[:1]),
        num_visual_tokens=[12, 4],
        return_text_replacement_offsets=True,
    )
    by_rows = model.get_image_features(shown["pixel_values"], visual_sides=torch.as_tensor(shown["visual_sides"]))
    for one, other in zip(as_pairs.pooler_output, by_rows.pooler_output, strict=True):
        assert torch.equal(one, other)


def test_a_count_without_the_images_shape_is_refused_in_one_line(aspect_model, aspect, photos):
    model, (_, processor) = aspect_model, aspect
    inputs = processor.apply_chat_template(conversation(0, photos[0])[:1], tokenize=True, num_visual_tokens=4)
    sizes = inputs.pop("tile_sizes")
    with pytest.raises(ValueError, match="tiles none came with a size; give the tile_sizes"):
        model(**inputs)
    with pytest.raises(ValueError, match="with a size; give the tile_sizes"):
        model(**inputs, tile_sizes=sizes[:0])
    model(**inputs, num_visual_tokens=[(2, 2)])


def test_an_export_keeps_its_sides(aspect, aspect_model, tmp_path):
    config, processor = aspect
    export_model(aspect_model, dict(aspect_model.state_dict()), processor, tmp_path / "model")
    assert TokenFlexConfig.from_pretrained(tmp_path / "model").sides == "aspect"
    again = TokenFlexProcessor.from_pretrained(tmp_path / "model")
    assert again.image_processor.sides == "aspect"
    assert again.tile_sides(12, [(10, 90)]) == [(2, 6)]
    data = encoded(90, 10)
    assert torch.equal(again.image_processor(data)["tile_sizes"], processor.image_processor(data)["tile_sizes"])


@pytest.mark.parametrize("max_pixels", [10**8, 1000])
def test_a_bad_sample_keeps_its_planned_length(aspect, aspect_index, max_pixels):
    dataset = PackDataset(aspect_index, aspect[1], "sqrt", 4, Limits(max_image_pixels=max_pixels))
    for sample, count in ((0, 12), (2, 0)):
        (view,) = dataset.prepared(sample, count)
        assert (view.problem is not None) == (sample == 0 and max_pixels == 1000)
        visual = count * int(aspect_index.num_tiles[sample])
        assert len(view.input_ids) == int(aspect_index.text_tokens[sample]) + visual
        assert sum(rows * columns for rows, columns in view.sides) == len(view.visual) == visual


def test_a_square_model_asks_for_nothing_new(processor):
    assert set(processor.image_processor(encoded(90, 10))) == {"pixel_values", "num_tiles"}
    assert processor.tile_sides(12, [(10, 90)]) == [(3, 4)]
