"""Injected = skipped + repaired, exactly: by name, under random damage, in validation, in the index and in training."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import TINY, run_ranks
from PIL import ImageFile

from tokenflex.data import Limits, PackDataset, Tally, find_shards, load_or_build_index, scan_shard
from tokenflex.data.images import verify_image
from tokenflex.data.loader import MicroBatchPlan
from tokenflex.errors import UserError
from tokenflex.plan import Position
from tokenflex.prepare.validate import validate, validate_shard

sys.path.insert(0, str(Path(__file__).parent))
import bad_samples
from bad_samples import JPEG, cases, good_bytes, key_of, write_bad_shard

LIMITS = Limits(max_member_bytes=2**20)
CASES = cases()
SKIPPED = {name: case for name, case in CASES.items() if case.skip}
REPAIRED = {name: case for name, case in CASES.items() if case.repair}
FOUND_WHEN_DECODED = [name for name, case in SKIPPED.items() if case.at == "decode"]


def expected_reasons(named):
    return Counter(case.skip for case in named.values())


@pytest.fixture(scope="module")
def bad_shard(tmp_path_factory):
    shard = tmp_path_factory.mktemp("bad") / "bad.tar"
    write_bad_shard(shard, CASES)
    return shard


def test_there_are_enough_cases_and_each_says_what_must_come_of_it():
    assert len(CASES) >= 60
    assert all(bool(case.skip) != bool(case.repair) for case in CASES.values())


def test_injected_is_skipped_plus_repaired_exactly(bad_shard):
    tally, problems, _ = validate_shard(bad_shard, LIMITS)
    assert tally.skipped == expected_reasons(SKIPPED)
    assert tally.repairs == Counter(kind for case in REPAIRED.values() for kind in case.repair)
    assert tally.num_skipped + tally.num_repaired == len(CASES)
    assert tally.num_good == len(REPAIRED) + len(CASES) + 1  # and every good sample among them is still good
    found = {problem.key: problem.reason for problem in problems if problem.key}
    wanted = {key_of(name): case.skip for name, case in SKIPPED.items()}
    del wanted[key_of("headers wiped")]  # of that one nothing is left, not even its name
    assert found == wanted
    assert all(problem.shard == str(bad_shard) and problem.offset >= 0 for problem in problems)


@pytest.mark.parametrize("name", REPAIRED)
def test_what_can_be_put_right_decodes_to_plain_pixels(name, processor):
    for extension, data in CASES[name].members[1:]:
        if "special-text" not in CASES[name].repair:
            assert set(verify_image(data, LIMITS).repairs) == set(CASES[name].repair), extension
        tiles = processor.image_processor.tiled(data)
        assert tiles.shape == (1, 48, 64, 3) and tiles.dtype == np.uint8


@pytest.mark.parametrize("name", FOUND_WHEN_DECODED)
def test_validation_and_training_agree_on_what_decodes(name, processor):
    """Two decoders look at an image, one that only judges and the model's own; neither may take what the other refuses."""
    data = dict(CASES[name].members).popitem()[1] if len(CASES[name].members) == 1 else CASES[name].members[1][1]
    with pytest.raises(UserError):
        verify_image(data, LIMITS)
    with pytest.raises((OSError, ValueError, SyntaxError)):
        processor.image_processor.tiled(data)


@pytest.mark.parametrize("name", ["png bomb", "jpeg bomb", "webp bomb"])
def test_a_bomb_is_refused_by_its_header_before_anything_is_decoded(name, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **kwargs: pytest.fail("decoded"))
    with pytest.raises(UserError, match="not a readable image .* pixels"):
        verify_image(CASES[name].members[1][1], LIMITS)
    with pytest.raises(UserError, match="48 x 40 pixels by its header, at most 1919 are allowed"):
        verify_image(JPEG, Limits(max_image_pixels=48 * 40 - 1))


@pytest.fixture(scope="module")
def plain_shard(tmp_path_factory):
    """Twelve good samples and their (key, offset, end, members)."""
    shard = tmp_path_factory.mktemp("plain") / "plain.tar"
    shard.write_bytes(b"".join(good_bytes(f"k{i:02d}") for i in range(12)) + bytes(10_240))
    return shard, [(s.key, s.offset, s.offset + s.num_bytes, s.sample) for s in scan_shard(shard, LIMITS)]


def test_one_flipped_byte_costs_the_sample_it_lies_in_and_no_other(plain_shard, tmp_path):
    shard, whole = plain_shard
    data = shard.read_bytes()
    damaged = tmp_path / "flipped.tar"
    rng = np.random.default_rng(0)
    places = [int(x) for x in rng.integers(0, whole[-1][2], 150)]
    places += [begin + at for _, begin, _, _ in whole[::3] for at in (0, 100, 124, 148, 156, 257, 300)]  # header fields
    for place in places:
        damaged.write_bytes(bad_samples.flipped(data, place, int(rng.integers(1, 256))))
        found = list(scan_shard(damaged, LIMITS))
        sound = {s.key: s.sample for s in found if s.problem is None}
        for key, begin, end, sample in whole:
            if not begin <= place < end:
                assert sound.get(key) == sample, f"a flip at byte {place} lost {key} [{begin}, {end})"
        assert len(found) - len(sound) <= 2, place


def test_a_shard_cut_anywhere_keeps_what_lies_before_the_cut_and_says_so(plain_shard, tmp_path):
    shard, whole = plain_shard
    data = shard.read_bytes()
    cut_shard = tmp_path / "cut.tar"
    for cut in [*range(1, whole[-1][2], 1201), *(end for _, _, end, _ in whole), whole[3][1] + 512]:
        cut_shard.write_bytes(data[:cut])
        found = list(scan_shard(cut_shard, LIMITS))
        sound = {s.key for s in found if s.problem is None}
        assert sound >= {key for key, _, end, _ in whole if end <= cut}
        assert any(s.problem is not None for s in found), cut


def test_empty_and_foreign_files_are_named(tmp_path):
    for name, data, reason in (
        ("empty", b"", "tar-empty"),
        ("blank", bytes(10_240), "tar-empty"),
        ("noise", bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)), "tar-damaged"),
        ("zip", b"PK\x03\x04" + bytes(3000), "tar-damaged"),
    ):
        (tmp_path / f"{name}.tar").write_bytes(data)
        (found,) = scan_shard(tmp_path / f"{name}.tar", LIMITS)
        assert found.problem.reason == reason, name


def test_duplicate_and_interleaved_keys_are_each_one_bad_sample(tmp_path):
    one, two = good_bytes("a"), good_bytes("b")
    members = lambda key: [
        bad_samples.tar_bytes(key, bad_samples.Case([m])) for m in (("json", bad_samples.record()), ("0.jpg", JPEG))
    ]  # noqa: E731
    (json_c, image_c), (json_d, image_d) = members("c"), members("d")
    (tmp_path / "x.tar").write_bytes(one + two + one + json_c + json_d + image_c + image_d + bytes(1024))
    (tmp_path / "y.tar").write_bytes(two + good_bytes("e") + bytes(1024))
    tally, problems = validate(find_shards([str(tmp_path)]), LIMITS)
    assert [(Path(p.shard).name, p.key, p.reason) for p in problems] == [
        ("x.tar", "a", "key-twice"),
        ("x.tar", "c", "key-twice"),
        ("x.tar", "d", "key-twice"),
        ("y.tar", "b", "key-twice"),
    ]
    assert (tally.num_good, tally.num_skipped) == (3, 4)


def test_names_that_escape_are_refused_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["/etc/a", "../a", "a/../../b", "..\\a", "\udcff\udcfe"]
    for i, name in enumerate(names):
        (tmp_path / f"{i}.tar").write_bytes(good_bytes(name) + bytes(1024))
        found = list(scan_shard(tmp_path / f"{i}.tar", LIMITS))
        assert {s.problem.reason for s in found} == {"member-name"}, name
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i}.tar" for i in range(len(names))]


@pytest.mark.parametrize("source", ["pipe:touch owned", "http://a/b.tar", "s3://bucket/x.tar", "gs:x", "file+ssh://x"])
def test_urls_are_refused_by_their_scheme(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is a URL of the scheme"):
        find_shards([source])
    assert not list(tmp_path.iterdir())


# In training


@pytest.fixture(scope="module")
def bad_index(bad_shard, processor, tmp_path_factory):
    return load_or_build_index([bad_shard], processor, tmp_path_factory.mktemp("index") / "i", LIMITS)


def plan_of(index, ids, count=4):
    counts = np.where(index.num_tiles[ids] > 0, count, 0)
    return MicroBatchPlan(Position(), True, np.asarray(ids), counts, 1.0)


def test_index_and_decoding_together_skip_exactly_what_was_injected(bad_shard, bad_index, processor):
    """What headers and text show is left out of the index; what only decoding shows has a substitute; no answer, no weight."""
    dataset = PackDataset(bad_index, processor, "sqrt", 4, LIMITS)
    batch = dataset.batch(plan_of(bad_index, np.arange(len(bad_index))))
    substitutes = {record["key"]: record["reason"] for record in batch.skipped}
    assert substitutes == {key_of(name): CASES[name].skip for name in FOUND_WHEN_DECODED}
    unlearned = int((bad_index.learned_tokens == 0).sum())
    blank = [name for name, case in SKIPPED.items() if case.skip == "no-answer"]
    assert unlearned <= len(blank)
    in_shard = Tally()
    in_shard.num_samples = len(bad_index) + bad_index.num_skipped()
    assert in_shard.num_samples == 2 * len(CASES) + 1
    assert bad_index.num_skipped() == len(SKIPPED) - len(FOUND_WHEN_DECODED) - len(blank)
    assert all(record["shard"] == str(bad_shard) and record["offset"] >= 0 for record in batch.skipped)


@pytest.mark.parametrize("count", [4, 12])
def test_a_substitute_has_the_planned_shape_and_no_weight_and_others_are_untouched(bad_index, processor, count):
    ids = np.arange(len(bad_index))
    dataset = PackDataset(bad_index, processor, "sqrt", 4, LIMITS)
    plan = plan_of(bad_index, ids, count)
    batch, again = dataset.batch(plan), PackDataset(bad_index, processor, "sqrt", 4, LIMITS).batch(plan)
    assert batch.skipped == again.skipped and torch.equal(batch.input_ids, again.input_ids)
    lengths = batch.cu_seq_lens.diff().numpy()
    np.testing.assert_array_equal(lengths, bad_index.text_tokens + bad_index.num_tiles.astype(np.int64) * plan.counts)
    assert len(batch.images) == bad_index.num_tiles.sum() == len(batch.tile_counts)
    assert sum(batch.tile_counts) == len(batch.visual_positions)
    bad = [record["sample"] for record in batch.skipped]
    owner = torch.bucketize(batch.logits_positions, batch.cu_seq_lens[1:].long(), right=True)
    assert not set(owner.tolist()) & set(bad)
    good = np.setdiff1d(ids, bad)
    alone = dataset.batch(plan_of(bad_index, good, count))
    assert torch.equal(alone.targets, batch.targets) and torch.equal(alone.weights, batch.weights)


def test_a_shard_that_is_damaged_after_indexing_gives_substitutes_not_a_crash(plain_shard, processor, tmp_path):
    shard = tmp_path / "s.tar"
    data = plain_shard[0].read_bytes()
    shard.write_bytes(data)
    index = load_or_build_index([shard], processor, tmp_path / "index", LIMITS)
    plan = plan_of(index, np.arange(len(index)))
    lengths = PackDataset(index, processor, "sqrt", 4, LIMITS).batch(plan).cu_seq_lens
    rng = np.random.default_rng(1)
    for place in rng.integers(0, int(index.offset[-1] + index.num_bytes[-1]), 60):
        shard.write_bytes(bad_samples.flipped(data, int(place), int(rng.integers(1, 256))))
        batch = PackDataset(index, processor, "sqrt", 4, LIMITS).batch(plan)
        assert torch.equal(batch.cu_seq_lens, lengths)
        assert len(batch.skipped) <= 1
        for record in batch.skipped:  # the one that the flip lies in
            assert index.offset[record["sample"]] <= place
            assert place < index.offset[record["sample"]] + index.num_bytes[record["sample"]]


def test_a_run_logs_and_counts_bad_samples_on_every_rank_and_stops_when_there_are_too_many(
    tmp_path, cache_dir, processor
):
    """Two real ranks; every twelfth image does not decode, and ten bad samples are allowed (1 % of at least 1,000).

    The run ends once in between, with a few bad samples met, and its second part goes on counting from there.
    """
    shard = tmp_path / "shards" / "s.tar"
    shard.parent.mkdir()
    broken = bad_samples.image_case(JPEG[: len(JPEG) // 2])
    with open(shard, "wb") as file:
        for i in range(48):
            file.write(good_bytes(f"k{i:02d}") if i % 12 else bad_samples.tar_bytes(f"k{i:02d}", broken))
        file.write(bytes(1024))
    arguments = ["launch/train.py", "--config", TINY, f"output_dir={tmp_path}", f"data.cache_dir={cache_dir}"]
    arguments += [f"data.train={shard.parent}"]
    ends = run_ranks(2, [*arguments, "train.num_steps=3"])
    assert [end.status for end in ends] == [0, 0], ends[0].output[-2000:]
    log = tmp_path / "tiny" / "metrics.jsonl"
    assert 0 < sum(json.loads(line)["num_bad_samples"] for line in log.read_text().splitlines()) <= 10
    ends = run_ranks(2, [*arguments, "train.num_steps=60"])
    assert [end.status for end in ends] == [2, 2], ends[0].output[-2000:]
    assert "samples are bad, more than data.max_bad_fraction=0.01 allows" in ends[0].output
    assert "Traceback" not in ends[0].output
    metrics = [json.loads(line) for line in log.read_text().splitlines()]
    num_bad, num_samples = (sum(line[name] for line in metrics) for name in ("num_bad_samples", "num_samples"))
    assert f"{num_bad} of {num_samples} samples are bad" in ends[0].output
    logs = sorted((tmp_path / "tiny" / "bad-samples").glob("rank-*.jsonl"))
    logged = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
    assert len(logged) == sum(line["num_bad_samples"] for line in metrics) > 10
    assert sum(line["num_bad_samples"] for line in metrics[:-1]) <= 10
    assert {record["key"] for record in logged} == {"k00", "k12", "k24", "k36"}
    assert {record["reason"] for record in logged} == {"image-data"}
    assert all(Path(record["shard"]).name == "s.tar" and record["offset"] >= 0 for record in logged)
