"""What a run remembers of its data: the same data are the same wherever they lie, and any change is named."""

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from test_fingerprint import dated  # noqa: F401  a fixture
from test_places import other_template, other_tiling, other_vocabulary
from test_shards import good, write_shard

from tokenflex.config import load_config
from tokenflex.data.identity import after_change, changes, check_same_data
from tokenflex.data.sources import Here, open_data
from tokenflex.errors import UserError
from tokenflex.plan import Position


def config_of(tmp_path, *sources, **more):
    listed = ", ".join(f"{{paths: {tmp_path}/{name}}}" for name in sources)
    overrides = [f"data.sources=[{listed}]", "data.train=[]", f"data.cache_dir={tmp_path}/cache", "data.num_workers=0"]
    return load_config(TINY, [*overrides, "data.packs_per_step=2", "data.lockstep_packs=2", *more.get("also", ())])


def opened(tmp_path, processor, *sources, **more):
    return open_data(config_of(tmp_path, *sources, **more), copy.copy(processor), Here(), say=lambda text: None)


def identity(tmp_path, processor, *sources):
    return opened(tmp_path, processor, *(sources or ("a", "b"))).identity


@pytest.fixture
def folder(tmp_path):
    for name, number in (("a", 3), ("b", 2)):
        (tmp_path / name).mkdir()
        for n in range(2):
            write_shard(tmp_path / name / f"{n}.tar", [good(f"{name}{n}{i}", images=i % 2) for i in range(number)])
    return tmp_path


def test_it_is_plain_json_and_says_what_is_there(folder, processor):
    found = identity(folder, processor)
    assert json.loads(json.dumps(found)) == found
    assert [source["summary"].split(",")[0] for source in found["sources"]] == [
        "6 samples of 2 shards",
        "4 samples of 2 shards",
    ]
    (name, size, checksum, number), _ = found["sources"][0]["shards"]
    assert (name, size, number) == ("0.tar", (folder / "a" / "0.tar").stat().st_size, 3) and len(checksum) == 16


def test_the_same_data_are_the_same(folder, processor):
    """Indexed again, touched, moved to another place, of another index folder: nothing has changed."""
    before = identity(folder, processor)
    os.utime(folder / "a" / "0.tar")
    shutil.rmtree(folder / "b" / "index")
    assert changes(before, identity(folder, processor)) == []
    (folder / "elsewhere").mkdir()
    for name in ("a", "b"):
        shutil.move(folder / name, folder / "elsewhere" / name)
    moved = identity(folder / "elsewhere", processor)
    assert changes(before, moved) == [] and moved["digest"] == before["digest"]
    check_same_data(before, moved, "run x")


def replaced(folder):
    write_shard(folder / "b" / "1.tar", [good("other")])
    shutil.rmtree(folder / "b" / "index")


def of_the_same_size(folder):
    path = folder / "b" / "1.tar"
    path.write_bytes(path.read_bytes().replace(b"Hello", b"Howdy"))
    shutil.rmtree(folder / "b" / "index")


def left_out(folder):
    """The same bytes, of which the index leaves a sample out now."""
    path = folder / "a" / "index" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["num_samples"], manifest["shards"][1]["num_samples"] = 2, 4
    path.write_text(json.dumps(manifest))


CHANGES = {
    "a shard added": (
        lambda folder: write_shard(folder / "a" / "2.tar", [good("new")]),
        r"/a: 1 shards added \(2.tar\)",
    ),
    "many shards added": (
        lambda folder: [write_shard(folder / "a" / f"9{n}.tar", [good(f"n{n}")]) for n in range(5)],
        r"/a: 5 shards added \(90.tar, 91.tar, 92.tar and 2 more\)",
    ),
    "a shard removed": (lambda folder: (folder / "a" / "0.tar").unlink(), r"/a: 1 shards removed \(0.tar\)"),
    "a shard replaced": (replaced, r"/b: 1 shards replaced \(1.tar: \d+ bytes before, \d+ now\)"),
    "a shard of the same size": (of_the_same_size, r"/b: 1 shards replaced \(1.tar"),
    "samples left out": (left_out, r"/a: 2 shards with other samples left out \(0.tar: 3 before, 2 now"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_has_changed_is_named(case, folder, processor):
    change, words = CHANGES[case]
    before = identity(folder, processor)
    change(folder)
    now = identity(folder, processor)
    with pytest.raises(UserError, match=words) as error:
        check_same_data(before, now, "run x")
    assert "\n" not in str(error.value) and "--accept-new-data" in str(error.value) and "--fresh" in str(error.value)
    assert str(error.value).startswith("run x: ")


@pytest.mark.parametrize(
    "change, words",
    [
        (other_template, "the chat template is another"),
        (other_vocabulary, "the tokenizer is another"),
        (other_tiling, "the tiling is another"),
    ],
)
def test_another_way_of_counting_is_named(change, words, folder, processor):
    lines = changes(identity(folder, processor), identity(folder, change(processor)))
    assert len(lines) == 2 and all(words in line for line in lines)


def test_other_sources_and_another_order_are_named(folder, processor):
    before = identity(folder, processor)
    assert any(
        "there were 2 sources, there are 1" in line for line in changes(before, identity(folder, processor, "a"))
    )
    assert len(changes(before, identity(folder, processor, "b", "a"))) == 2
    turned = json.loads(json.dumps(before))
    turned["sources"][0]["shards"].reverse()
    turned["digest"] = "other"
    assert changes(before, turned) == [f"{folder}/a: the shards come in another order"]
    with pytest.raises(UserError, match="its samples are others than those that are remembered"):
        check_same_data({**before, "digest": "other"}, before, "run x")  # known by its digest alone


def test_a_run_that_goes_on_another_day_keeps_its_date(folder, processor, dated):  # noqa: F811
    first = open_data(config_of(folder, "a"), copy.copy(dated), Here(), lambda text: None, render_date="2024-07-26")
    assert first.identity["render_date"] == first.processor.render_date == "2024-07-26"
    other = open_data(config_of(folder, "a"), copy.copy(dated), Here(), lambda text: None, render_date="2025-01-01")
    assert any(
        "the date in the chat template was 2024-07-26" in line for line in changes(first.identity, other.identity)
    )
    again = open_data(
        config_of(folder, "a"), copy.copy(dated), Here(), lambda text: None, render_date=first.identity["render_date"]
    )
    assert (
        changes(first.identity, again.identity) == [] and len(list(Path(folder, "a").glob("index*/manifest.json"))) == 2
    )


def test_new_data_are_taken_from_the_next_epoch_on(folder, processor):
    """Every sample of the grown data comes once in the epoch that follows, wherever the run stood in the one before."""
    before = opened(folder, processor, "a", "b")
    position = next(before.planner.steps_from(Position(3))).next_position
    write_shard(folder / "a" / "2.tar", [good(f"new{i}") for i in range(5)])
    grown = opened(folder, processor, "a", "b")
    assert changes(before.identity, grown.identity)
    start = after_change(position)
    assert start == Position(position.epoch + 1)
    ids = [pack.sample_ids for step in grown.planner.epoch_steps(start.epoch, start) for pack in step.packs]
    np.testing.assert_array_equal(np.sort(np.concatenate(ids)), np.arange(15))
