"""Laws of the embedded corpus: bytes depend on the request only, splits share no source, every answer is right."""

import io
import json

import numpy as np
import pytest
import webdataset
from PIL import Image

from tokenflex.corpus.build import build_corpus, draw_indexed_sample
from tokenflex.corpus.encoder import BACKGROUND, build_encoder, patch_labels
from tokenflex.corpus.glyphs import EVAL_FONTS, EVAL_PHOTOS, TRAIN_FONTS, TRAIN_PHOTOS, load_sources
from tokenflex.corpus.questions import ALL_CELLS, EASY_CELLS, TASKS
from tokenflex.corpus.scenes import IMAGE_SIDE, draw_grid, render
from tokenflex.corpus.tokenizer import build_tokenizer

NUM_TRAIN = 40
NUM_EVAL_PER_TASK = 3


@pytest.fixture(scope="module")
def sources():
    return {split: load_sources(split) for split in ("train", "eval")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus") / "one"
    return build_corpus(root, seed=3, num_train=NUM_TRAIN, num_eval_per_task=NUM_EVAL_PER_TASK, num_workers=1)


def read_bytes(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def shard_samples(root, split):
    urls = [str(path) for path in sorted((root / split).glob("shard-*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def test_bytes_are_the_same_for_any_number_of_workers(corpus, tmp_path):
    other = build_corpus(
        tmp_path / "two", seed=3, num_train=NUM_TRAIN, num_eval_per_task=NUM_EVAL_PER_TASK, num_workers=2
    )
    assert read_bytes(corpus) == read_bytes(other)


def test_another_seed_gives_other_bytes(corpus, tmp_path):
    other = build_corpus(
        tmp_path / "two", seed=4, num_train=NUM_TRAIN, num_eval_per_task=NUM_EVAL_PER_TASK, num_workers=1
    )
    for name in ("train/shard-00000.tar", "eval/shard-00000.tar"):
        assert (corpus / name).read_bytes() != (other / name).read_bytes()


def test_an_existing_corpus_is_kept_and_a_foreign_directory_refused(corpus):
    before = (corpus / "corpus.json").stat().st_mtime_ns
    build_corpus(corpus, seed=3, num_train=NUM_TRAIN, num_eval_per_task=NUM_EVAL_PER_TASK)
    assert (corpus / "corpus.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="wanted"):
        build_corpus(corpus, seed=3, num_train=NUM_TRAIN + 1, num_eval_per_task=NUM_EVAL_PER_TASK)


def test_splits_share_no_glyph_no_photo_and_no_font(sources):
    train, held_out = (set(np.concatenate(sources[split].glyph_ids).tolist()) for split in ("train", "eval"))
    assert not train & held_out
    assert len(train | held_out) == 5000
    assert not set(TRAIN_PHOTOS) & set(EVAL_PHOTOS)
    assert not set(TRAIN_FONTS) & set(EVAL_FONTS)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_samples_draw_from_their_own_split(sources, split):
    own = set(np.concatenate(sources[split].glyph_ids).tolist())
    for index in range(24):
        sample, _ = draw_indexed_sample(0, split, index, sources[split])
        for scene in sample.scenes:
            assert {glyph for row in scene.glyph_ids for glyph in row} <= own


@pytest.mark.parametrize("split", ["train", "eval"])
def test_webdataset_reads_every_sample_and_every_image_opens(corpus, split):
    samples = shard_samples(corpus, split)
    assert len(samples) == (NUM_TRAIN if split == "train" else NUM_EVAL_PER_TASK * len(TASKS))
    for sample in samples:
        record = json.loads(sample["json"])
        roles = [message["role"] for message in record["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert split == "train" or len(roles) == 2
        assert record["source"] == "embedded"
        kinds = [item["type"] for message in record["messages"] for item in message["content"]]
        images = [name for name in sample if name.endswith(".jpg")]
        assert kinds.count("image") == len(images) == {"text": 0, "pair": 2}.get(record["task"], 1)
        for name in images:
            with Image.open(io.BytesIO(sample[name])) as image:
                assert image.convert("RGB").size == (IMAGE_SIDE, IMAGE_SIDE)


def test_the_manifest_counts_what_the_shards_hold(corpus):
    manifest = json.loads((corpus / "corpus.json").read_text())
    for split in ("train", "eval"):
        tasks = [json.loads(sample["json"])["task"] for sample in shard_samples(corpus, split)]
        assert manifest["num_samples"][split] == {task: tasks.count(task) for task in sorted(set(tasks))}


def expected_answer(question, scenes):
    """Answers `question` from the scenes, by other means than questions.py."""
    match question.split():
        case ["larger", "of", *digits]:
            return max(digits)
        case ["difference", "of", left, right]:
            return str(abs(int(left) - int(right)))
        case ["read", "word"]:
            return scenes[0].word
        case ["digit", "in", "image", number]:
            return str(scenes[int(number) - 1].rows[0][0])
        case ["larger", "image"]:
            return str(1 + int(np.argmax([scene.rows[0][0] for scene in scenes])))
        case ["count", "digits"]:
            return str(sum(digit is not None for row in scenes[0].rows for digit in row))
        case ["count", digit]:
            return str(sum(row.count(int(digit)) for row in scenes[0].rows))
        case ["read", "row", row]:
            return " ".join(f"{'ABCDEFG'[i]}{row} {digit}" for i, digit in enumerate(scenes[0].rows[int(row) - 1]))
        case ["which", "color"]:
            return scenes[0].ink
        case ["digit", "at", cell]:
            return f"{cell} {scenes[0].rows[int(cell[1]) - 1]['ABCDEFG'.index(cell[0])]}"
        case ["read", "digits"]:
            cells = [
                (f"{'ABCDEFG'[j]}{i + 1}", digit) for i, row in enumerate(scenes[0].rows) for j, digit in enumerate(row)
            ]
            return " ".join(f"{cell} {digit}" for cell, digit in cells)
    raise AssertionError(f"unknown question {question!r}")


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_answer_is_right_for_what_was_drawn(sources, split):
    for index in range(64):
        sample, _ = draw_indexed_sample(7, split, index, sources[split])
        for turn in sample.turns:
            assert turn.answer == expected_answer(turn.question, sample.scenes), turn


def ink_box(pixels):
    """Returns the ink of `pixels`, cropped to its bounding box, at 20 x 20."""
    rows, columns = np.nonzero(pixels > 160)
    box = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return np.asarray(Image.fromarray(box).resize((20, 20)), np.float64).ravel()


def test_training_reads_whole_grids_small_ones_first(sources):
    """What makes places learnable in minutes: every digit of an image answered, and a name bound to its place early."""
    first, later = set(), set()
    for index in range(240):
        sample, _ = draw_indexed_sample(1, "train", index, sources["train"], num_easy=100)
        if sample.task == "grid":
            (first if index < 100 else later).add(len(sample.scenes[0].rows))
            assert max(len(turn.answer.split()) // 2 for turn in sample.turns) == len(sample.scenes[0].rows) ** 2
    assert first == set(EASY_CELLS) and later == set(ALL_CELLS)


def test_patches_are_labelled_with_the_digit_they_show(sources):
    """All ink lies in patches with a label, and every label is of a digit of the scene."""
    rng = np.random.default_rng(0)
    for num_cells in ALL_CELLS:
        scene = draw_grid(rng, sources["eval"], num_cells=num_cells)
        image, boxes = render(scene, rng, sources["eval"])
        labels = patch_labels(boxes, IMAGE_SIDE, IMAGE_SIDE)
        assert set(labels.ravel().tolist()) - {BACKGROUND} == {digit for row in scene.rows for digit in row}
        is_ink = np.asarray(image).max(axis=2) > 160  # every ink is bright in some channel, no background is
        assert np.mean(labels[is_ink] != BACKGROUND) > 0.95
        assert np.mean(labels != BACKGROUND) < 0.75


def test_the_encoder_is_built_once_and_is_a_function_of_its_seed(tmp_path):
    first, second = (
        build_encoder(tmp_path / name, seed=3, num_scenes=40, num_steps=4, num_workers=workers)
        for name, workers in (("one", 1), ("two", 2))
    )
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert build_encoder(first, seed=3).joinpath("model.safetensors").stat().st_mtime_ns == before


def test_the_pixels_show_the_glyph_that_the_scene_names(sources):
    glyphs = {
        int(identity): glyph
        for ids, boxes in zip(sources["eval"].glyph_ids, sources["eval"].glyphs)
        for identity, glyph in zip(ids, boxes)
    }
    own, other = [], []
    for index in range(TASKS.index("pair"), 32 * len(TASKS), len(TASKS)):
        sample, images = draw_indexed_sample(0, "eval", index, sources["eval"])
        (glyph_id,) = sample.scenes[0].glyph_ids[0]
        with Image.open(io.BytesIO(images[0])) as image:
            drawn = ink_box(np.asarray(image).max(axis=2))  # every ink is bright in some channel, no background is
        own.append(np.corrcoef(drawn, ink_box(glyphs[glyph_id]))[0, 1])
        other.append(np.corrcoef(drawn, ink_box(glyphs[sources["eval"].glyph_ids[index % 10][0]]))[0, 1])
    assert np.median(own) > 0.7 and np.median(own) > np.median(other) + 0.3, (np.median(own), np.median(other))


def test_tokenizer_round_trips_any_text():
    tokenizer = build_tokenizer()
    alphabet = [chr(code) for code in (*range(1, 0x250), 0x0301, 0x4E2D, 0x1F642, 0x200B, 0xFFFD)]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(alphabet, size=40)) for _ in range(50)] + ["", " ", "\r\n\t x", "12 345\n\n"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_and_markers_are_single_tokens(corpus):
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("907") == ["9", "0", "7"]
    assert len(tokenizer) <= 600
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"):
        assert tokenizer.tokenize(token) == [token]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_chat_template_writes_chatml():
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which digit"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
        ]
    }
    tokenizer = build_tokenizer()
    prompt = "<|im_start|>user\n<img><IMG_CONTEXT></img>\nwhich digit<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer.apply_chat_template(record["messages"], tokenize=False)
    assert whole == prompt + "3<|im_end|>\n"
    assert prompt == tokenizer.apply_chat_template(record["messages"][:1], tokenize=False, add_generation_prompt=True)
    # A prompt is a prefix of its conversation in tokens too, so a label mask can be cut at the answer.
    assert tokenizer.encode(whole)[: len(tokenizer.encode(prompt))] == tokenizer.encode(prompt)
