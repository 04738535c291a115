"""Laws of tiling: index = processor = trainer, packed = unpacked logits, and an export that answers the same without us."""

import io
import json
import subprocess
import sys
import tarfile
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import STRANGER, train_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenflex.data import Limits, PackDataset, load_or_build_index
from tokenflex.data.loader import MicroBatchPlan
from tokenflex.model import build_model, build_processor, image_processing_tokenflex
from tokenflex.model.image_processing_tokenflex import TokenFlexImageProcessor
from tokenflex.model.tiling import grids, grids_for, tiles_for
from tokenflex.plan import Position
from tokenflex.train.objective import model_inputs

sides = st.integers(1, 5000)


def grid_by_hand(width, height, max_tiles, tile_height, tile_width):
    """The rule of InternVL 1.5 said once more, with exact fractions and one image at a time."""
    best, best_gap = None, None
    for number in range(1, max_tiles + 1):
        for columns in range(1, number + 1):
            if number % columns:
                continue
            rows = number // columns
            gap = abs(Fraction(width, height) - Fraction(columns * tile_width, rows * tile_height))
            if best is None or gap < best_gap:
                best, best_gap = (rows, columns), gap
            elif gap == best_gap and width * height * 2 > rows * columns * tile_height * tile_width:
                best = (rows, columns)
    return best


@given(width=sides, height=sides, max_tiles=st.integers(1, 12), square=st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_grid_is_the_one_that_the_rule_by_hand_gives(width, height, max_tiles, square):
    size = (448, 448) if square else (384, 336)
    rows, columns = grids_for([width], [height], max_tiles, size)
    assert (rows[0], columns[0]) == grid_by_hand(width, height, max_tiles, *size)
    tiles = [int(tiles_for([width], [height], max_tiles, thumbnail, size)[0]) for thumbnail in (False, True)]
    assert tiles[0] == rows[0] * columns[0] <= max_tiles
    assert tiles[1] == tiles[0] + (tiles[0] > 1)


def test_known_grids():
    """Worked by hand for tiles of 448: a wide strip, a page, a small and a large square, and the unreadable."""
    known = {
        (1344, 448): (1, 3),
        (600, 850): (3, 2),
        (448, 448): (1, 1),
        (1000, 1000): (2, 2),
        (0, 0): (1, 1),
        (10, 9000): (6, 1),
    }
    widths, heights = np.array(list(known)).T
    rows, columns = grids_for(widths, heights, 6)
    assert list(zip(rows.tolist(), columns.tolist())) == list(known.values())
    assert tiles_for(widths, heights, 1, True).tolist() == [1] * len(known)
    assert tiles_for([], [], 6, True).shape == (0,)
    assert len(set(grids(12))) == len(grids(12)) == 35
    with pytest.raises(ValueError, match="max_tiles is 0"):
        tiles_for([1], [1], 0, True)


def test_a_million_images_are_tiled_at_once():
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(1, 4000, (2, 10**6))
    tiles = tiles_for(widths, heights, 6, True)
    assert tiles.shape == (10**6,) and tiles.min() == 1 and tiles.max() == 7


SIZES = [(64, 48), (200, 50), (50, 200), (300, 300), (129, 65), (701, 433), (1400, 900), (3, 700)]


def photo(number, size, format="JPEG", turned=False):
    pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    if turned:
        image.getexif()[0x0112] = 6
    file = io.BytesIO()
    image.save(file, format, exif=image.getexif())
    return file.getvalue()


def photos():
    """Two images per sample of every size, JPEG and PNG, some turned by EXIF."""
    made = [photo(i, size, "PNG" if i % 3 == 2 else "JPEG", turned=i % 2 == 0) for i, size in enumerate(SIZES)]
    return [made[i : i + 2] for i in range(0, len(made), 2)]


@pytest.fixture(scope="module")
def tiled_config(tiny_config):
    return tiny_config.model_copy(update={"model": tiny_config.model.model_copy(update={"max_tiles": 6})})


@pytest.fixture(scope="module")
def tiled_processor(tiled_config, corpus):
    return build_processor(tiled_config.model, tiled_config.budget)


@pytest.fixture(scope="module")
def tiled_index(tmp_path_factory, tiled_processor):
    folder = tmp_path_factory.mktemp("tiled")
    with tarfile.open(folder / "s.tar", "w") as tar:

        def add(name, data):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for number, images in enumerate([*photos(), []]):
            content = [{"type": "image"}] * len(images) + [{"type": "text", "text": f"What is {number}?"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "it"}]
            add(f"{number}.json", json.dumps({"messages": messages}).encode())
            for i, data in enumerate(images):
                add(f"{number}.{i}.jpg", data)
    return load_or_build_index([folder / "s.tar"], tiled_processor, folder / "index", Limits())


@pytest.fixture(scope="module")
def dataset(tiled_index, tiled_processor):
    return PackDataset(tiled_index, tiled_processor, "sqrt", blank_count=4, limits=Limits())


def pack(dataset, index, count):
    ids = np.arange(len(index))
    counts = np.where(index.num_tiles > 0, count, 0)
    return dataset.batch(MicroBatchPlan(Position(), True, ids, counts, 1.0))


def test_the_index_knows_every_tile_before_an_image_is_decoded(dataset, tiled_index, tiled_processor):
    tiles = [sum(len(tiled_processor.image_processor.tiled(data)) for data in images) for images in [*photos(), []]]
    assert tiled_index.num_tiles.tolist() == tiles and max(tiles) > 7 and tiles[-1] == 0
    for count in (4, 12):
        batch = pack(dataset, tiled_index, count)
        assert not batch.skipped
        expected = tiled_index.text_tokens + count * tiled_index.num_tiles.astype(np.int64)
        np.testing.assert_array_equal(batch.cu_seq_lens.diff().numpy(), expected)
        assert len(batch.images) == len(batch.tile_counts) == sum(tiles)


def test_another_tiling_is_another_index(dataset, tiled_config, corpus):
    from tokenflex.data.index import fingerprint

    prints = set()
    for change in ({}, {"max_tiles": 5}, {"thumbnail": False}, {"image_size": (48, 48)}):
        section = tiled_config.model.model_copy(update=change)
        prints.add(fingerprint(build_processor(section, tiled_config.budget)))
    assert len(prints) == 4


@pytest.mark.parametrize("has_simplejpeg", [True, False])
def test_the_processor_gives_the_trainers_pixels(
    dataset, tiled_index, tiled_processor, tmp_path, monkeypatch, has_simplejpeg
):
    """From bytes and from files alike, and without the faster decoder too: bit for bit."""
    trained = pack(dataset, tiled_index, 4).images
    if not has_simplejpeg:
        monkeypatch.setattr(image_processing_tokenflex, "simplejpeg", None)
    flat = [data for images in photos() for data in images]
    paths = [tmp_path / f"{i}.jpg" for i in range(len(flat))]
    for path, data in zip(paths, flat):
        path.write_bytes(data)
    processor = tiled_processor.image_processor
    for images in (flat, paths, list(map(str, paths))):
        assert torch.equal(processor(images)["pixel_values"], processor.normalised(trained))


def test_an_image_that_was_decoded_elsewhere_differs_by_little(tiled_processor):
    """JPEGs are decoded at a half or a quarter where that is enough; a whole decoded image is shrunk in one go instead."""
    processor = TokenFlexImageProcessor(48, 64)
    for number, size in enumerate(((640, 480), (1023, 771), (2400, 1601))):
        data = photo(number, size)
        whole = processor.tiled(Image.open(io.BytesIO(data))).astype(int)
        assert np.abs(processor.tiled(data) - whole).mean() < 2.0


def test_tiles_lie_row_by_row_and_the_thumbnail_is_last():
    image = np.zeros((96, 192, 3), np.uint8)
    image[:48, :64], image[48:, 128:] = (255, 0, 0), (0, 0, 255)
    tiles = TokenFlexImageProcessor(48, 64, max_tiles=6).tiled(image)
    assert tiles.shape == (7, 48, 64, 3)
    assert tiles[0, ..., 0].min() == 255 and tiles[5, ..., 2].min() == 255 and tiles[1:5].max() == 0
    assert tiles[6, 0, 0, 0] == 255 and tiles[6, -1, -1, 2] == 255 and tiles[6, 0, -1].max() == 0
    assert TokenFlexImageProcessor(48, 64, max_tiles=6, thumbnail=False).tiled(image).shape == (6, 48, 64, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (2, 3)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_extreme_shapes_make_whole_tiles(size, format):
    processor = TokenFlexImageProcessor(48, 64, max_tiles=6)
    assert processor.tiled(photo(0, size, format)).shape == (int(processor.num_tiles(*size)), 48, 64, 3)


def conversation(number, images):
    content = [{"type": "image", "image": data} for data in images] + [{"type": "text", "text": f"What is {number}?"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "it"}]


def test_packed_logits_equal_unpacked_logits_with_tiles(tiled_config, tiled_processor, tiled_index, dataset):
    torch.manual_seed(1)
    model = build_model(tiled_config.model, tiled_config.budget, tiled_processor, torch.float32).eval()
    for count in (4, 7):
        batch = pack(dataset, tiled_index, count)
        with torch.no_grad():
            model.language_model.set_attn_implementation("tokenflex_packed")
            packed = model(**model_inputs(batch, tiled_processor.image_processor.normalised)).logits[0]
            model.language_model.set_attn_implementation("sdpa")
            for number, images in enumerate([*photos(), []]):
                inputs = tiled_processor.apply_chat_template(
                    conversation(number, images), tokenize=True, num_visual_tokens=count if images else None
                )
                alone = model(**inputs, use_cache=False).logits[0]
                begin, end = batch.cu_seq_lens[number : number + 2]
                torch.testing.assert_close(packed[begin:end], alone, rtol=1e-4, atol=2e-5)


def test_generation_with_tiles_at_any_count(tiled_config, tiled_processor):
    torch.manual_seed(0)
    model = build_model(tiled_config.model, tiled_config.budget, tiled_processor, torch.float32).eval()
    model.language_model.set_attn_implementation("sdpa")
    talk = conversation(0, photos()[1])[:1]
    ask = lambda count: tiled_processor.apply_chat_template(  # noqa: E731
        talk, tokenize=True, add_generation_prompt=True, num_visual_tokens=count
    )
    tiles = ask(4)["num_tiles"]  # the first is turned by its EXIF
    assert tiles.tolist() == tiled_processor.image_processor.num_tiles([200, 300], [50, 300]).tolist()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for counts in (6, [9, 4]):
        wide, built = ask(12), ask(counts)
        assert (built["input_ids"] == tiled_processor.image_token_id).sum() == (torch.tensor(counts) * tiles).sum()
        asked = model.generate(**wide, num_visual_tokens=counts, **options)[:, wide["input_ids"].shape[1] :]
        assert torch.equal(asked, model.generate(**built, **options)[:, built["input_ids"].shape[1] :])
    with pytest.raises(ValueError, match="num_tiles .* adds up to"):
        model.generate(**{**ask(4), "num_tiles": tiles - 1}, **options)
    with pytest.raises(ValueError, match="cannot be shared by the"):
        model(**{**ask(1), "num_tiles": torch.tensor([int(tiles.sum()) - 4, 4])})


ANSWER = """
content = [{"type": "image", "path": image} for image in rest] + [{"type": "text", "text": "What is 1?"}]
messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "it"}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", num_visual_tokens=4)
torch.save(model(**inputs).logits.detach(), folder + ".logits")
print(model.generate(**inputs, num_visual_tokens=12, max_new_tokens=3).shape[0])
"""


def test_an_export_without_this_package_gives_the_trainers_logits(tiled_config, tiled_processor, dataset, tmp_path):
    """Files on disk, decoded and tiled by the exported code, against the pack that the trainer would have run."""
    from tokenflex.export import export_model

    torch.manual_seed(2)
    model = build_model(tiled_config.model, tiled_config.budget, tiled_processor, torch.float32).eval()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    export_model(model, state, tiled_processor, tmp_path / "model")
    images = [tmp_path / f"{i}.jpg" for i in range(2)]
    for path, data in zip(images, photos()[1]):
        path.write_bytes(data)
    (tmp_path / "stranger.py").write_text(STRANGER + ANSWER)
    command = [sys.executable, tmp_path / "stranger.py", tmp_path / "model", *images]
    end = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert end.returncode == 0, end.stderr[-3000:]
    batch = dataset.batch(MicroBatchPlan(Position(), True, np.array([1]), np.array([4]), 1.0))
    with torch.no_grad():
        ours = model(**model_inputs(batch, tiled_processor.image_processor.normalised)).logits
    torch.testing.assert_close(torch.load(f"{tmp_path / 'model'}.logits"), ours, rtol=1e-4, atol=2e-5)


def test_a_real_run_trains_on_tiles(tmp_path):
    overrides = ("model.max_tiles=4", "data.max_images_per_pack=40", "train.num_steps=2", "data.pack_length=1024")
    train_ranks(2, tmp_path, tmp_path / "cache", *overrides)  # an index of its own: the tiling is another
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["num_bad_samples"] == 0 and line["num_visual_tokens"] > 0 for line in lines)
    saved = json.loads((tmp_path / "tiny" / "model" / "processor_config.json").read_text())
    assert saved["image_processor"]["max_tiles"] == 4
