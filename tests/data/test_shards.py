"""Shards and index: real webdataset files in, every sample at its place, every bad one named."""

import io
import os
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from tokenflex.data import Limits, find_shards, load_index, load_or_build_index, parse_sample, walk_shard
from tokenflex.data.index import build_index
from tokenflex.data.shards import read_sample
from tokenflex.errors import UserError
from tokenflex.prepare.validate import check_sample

LIMITS = Limits()
TURN = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "7"},
]


def png(size=(8, 8), color="red"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def write_shard(path, samples):
    """`samples`: a list of (key, {extension: bytes or JSON value}), written by webdataset itself."""
    with webdataset.TarWriter(str(path)) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    return path


def good(key="a", images=1):
    content = [{"type": "image"}] * images + [{"type": "text", "text": "Hello"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    return key, {"json": {"messages": messages}, **{f"{i}.png": png() for i in range(images)}}


def test_walk_and_read_back_by_place(tmp_path):
    names = ["a", "b/c", "x" * 180]  # the last needs an extended tar header
    shard = write_shard(tmp_path / "s.tar", [good(name, images=i) for i, name in enumerate(names)])
    walked = list(walk_shard(shard, LIMITS))
    assert [members["__key__"] for members, _, _ in walked] == names
    with open(shard, "rb") as file:
        for members, offset, num_bytes in reversed(walked):
            assert read_sample(file, offset, num_bytes, shard, LIMITS) == members
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(str(shard), shardshuffle=False)]
    assert theirs == names


def test_find_shards_takes_files_folders_and_patterns(tmp_path):
    for name in ("b.tar", "a.tar", "note.txt"):
        (tmp_path / name).touch()
    both = [tmp_path / "a.tar", tmp_path / "b.tar"]
    assert find_shards([str(tmp_path)]) == find_shards([str(tmp_path / "*.tar")]) == both
    assert find_shards([str(tmp_path / "b.tar"), str(tmp_path / "a.tar")]) == both[::-1]
    with pytest.raises(UserError, match="data.train: no shard at .*missing.*wanted"):
        find_shards([str(tmp_path / "missing.tar")])


BAD = {
    "no json": (lambda m: m.pop("json"), "has no .json"),
    "broken json": (lambda m: m.update(json=b"{nope"), "not valid JSON"),
    "json of another shape": (lambda m: m.update(json=[1]), "no list of messages"),
    "tag without image": (lambda m: m.pop("0.png"), "1 image tags but the sample has 0 images"),
    "image without tag": (lambda m: m.update({"1.png": png()}), "1 image tags but the sample has 2 images"),
    "gap in the numbers": (lambda m: m.update({"2.png": png()}), r"numbered \[0, 2\]"),
    "image without number": (lambda m: m.update({"cat.png": png()}), "has no number"),
    "unknown role": (lambda m: m["json"]["messages"][0].update(role="robot"), "role 'robot'"),
    "unknown item": (lambda m: m["json"]["messages"][0]["content"].append({"type": "audio"}), "'audio'"),
    "text item without text": (
        lambda m: m["json"]["messages"][0]["content"].append({"type": "text"}),
        "text item with its text",
    ),
    "content of another type": (lambda m: m["json"]["messages"][1].update(content=7), "content is a int"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_named_with_its_shard_and_key(case, tmp_path):
    spoil, part = BAD[case]
    key, members = good("the-key")
    spoil(members)
    shard = write_shard(tmp_path / "bad.tar", [(key, members)])
    with pytest.raises(UserError, match=part) as error:
        for members, _, _ in walk_shard(shard, LIMITS):
            parse_sample(members, shard)
    assert "bad.tar" in str(error.value) and "the-key" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"", b"not an image", png()[:40]], ids=["empty", "text", "truncated"])
def test_a_bad_image_is_named_when_it_is_decoded(data, tmp_path):
    key, members = good("the-key")
    members["0.png"] = data
    sample = parse_sample(next(walk_shard(write_shard(tmp_path / "s.tar", [(key, members)]), LIMITS))[0], "s.tar")
    with pytest.raises(UserError, match="image 0: not a readable image"):
        check_sample(sample, LIMITS)


def test_damaged_and_hostile_shards_are_refused(tmp_path):
    garbage = tmp_path / "garbage.tar"
    garbage.write_bytes(b"\x01" * 2000)
    with pytest.raises(UserError, match="garbage.tar: there is no sound tar header at byte 0"):
        list(walk_shard(garbage, LIMITS))
    link = tmp_path / "link.tar"
    with tarfile.open(link, "w") as tar:
        info = tarfile.TarInfo("a.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="'a.json' is not a regular file"):
        list(walk_shard(link, LIMITS))


def test_index_says_what_the_processor_encodes(index, processor, corpus):
    for sample_id in range(0, len(index), 7):
        shard = index.shard_of(sample_id)
        with open(shard, "rb") as file:
            members = read_sample(file, int(index.offset[sample_id]), int(index.num_bytes[sample_id]), shard, LIMITS)
        sample = parse_sample(members, shard)
        for count in (1, 9):
            encoded = processor.encode(sample.messages, [count] * len(sample.images))
            assert len(encoded.input_ids) == index.text_tokens[sample_id] + count * index.num_images[sample_id]
            assert sum(encoded.is_target) == index.learned_tokens[sample_id] > 0


def test_index_is_the_same_for_any_number_of_processes(corpus, processor, tmp_path):
    shards = find_shards([str(corpus / "train")]) * 3
    for workers in (1, 2):
        build_index(shards, processor, tmp_path / str(workers), LIMITS, workers)
    one, two = (load_index(tmp_path / str(workers), shards, processor) for workers in (1, 2))
    for column in ("text_tokens", "learned_tokens", "num_images", "offset", "num_bytes"):
        np.testing.assert_array_equal(getattr(one, column), getattr(two, column))


def test_a_shard_that_changes_under_the_index_is_noticed(tmp_path, processor):
    from tokenflex.data import PackDataset
    from tokenflex.data.loader import MicroBatchPlan
    from tokenflex.plan import Position

    shard = write_shard(tmp_path / "s.tar", [good("a"), good("b")])
    index = load_or_build_index([shard], processor, tmp_path / "index", LIMITS)
    dataset = PackDataset(index, processor, "sqrt", 4, LIMITS)
    plan = MicroBatchPlan(Position(), True, np.array([0, 1]), np.array([4, 4]), 1.0)
    assert dataset.batch(plan).images.shape[0] == 2
    longer = good("a")
    longer[1]["json"]["messages"][1]["content"] = "no no no no"
    write_shard(shard, [longer, good("b")])
    batch = PackDataset(index, processor, "sqrt", 4, LIMITS).batch(plan)
    assert [(record["reason"], record["key"]) for record in batch.skipped] == [("length", "a")]
    assert "the shard has changed: index it again" in batch.skipped[0]["detail"]
    os.truncate(shard, 100)
    batch = PackDataset(index, processor, "sqrt", 4, LIMITS).batch(plan)
    assert [record["reason"] for record in batch.skipped] == ["tar-damaged"] * 2
    assert all("the shard has changed: index it again" in record["detail"] for record in batch.skipped)
    shard.unlink()
    with pytest.raises(UserError, match="No such file.*restore it"):
        PackDataset(index, processor, "sqrt", 4, LIMITS).batch(plan)
