"""One set of shards, several tokenizers: an index for each, beside each other, found again, listed and removed."""

import copy
import os
import pickle
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_shards import LIMITS, good, write_shard

from tokenflex import cli
from tokenflex.config import DataConfig
from tokenflex.data.index import (
    Alone,
    fingerprint,
    index_folder,
    load_or_build_index,
    open_index,
    parts_folder,
    sole_builder,
)
from tokenflex.data.scan import scan_shard
from tokenflex.data.sources import build_indexes, index_sources, locate_sources
from tokenflex.errors import UserError


def other_template(processor):
    other = copy.copy(processor)
    other.chat_template = processor.chat_template.replace("<|im_end|>", " <|im_end|>")
    return other


def other_vocabulary(processor):
    other = copy.copy(processor)
    other.tokenizer = copy.deepcopy(processor.tokenizer)
    other.tokenizer.add_tokens(["Hello"])
    return other


def other_tiling(processor):
    other = copy.copy(processor)
    other.image_processor = copy.deepcopy(processor.image_processor)
    other.image_processor.max_tiles = processor.image_processor.max_tiles + 1
    return other


KINDS = {"template": other_template, "vocabulary": other_vocabulary, "tiling": other_tiling}


@pytest.fixture
def data(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for n in range(2):
        write_shard(shards / f"{n}.tar", [good(f"{n}{i}", images=i) for i in range(3)])
    return DataConfig(train=(str(shards),), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def scans(monkeypatch):
    """Names of the shards that were read, as they are."""
    read, scan = [], scan_shard
    monkeypatch.setattr(
        "tokenflex.data.shards.scan_shard", lambda path, limits: read.append(path.name) or scan(path, limits)
    )
    return read


def build(data, processor):
    (folder,) = build_indexes(locate_sources(data), processor, data)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_each_tokenizer_has_its_own_index_and_none_is_built_twice(kind, data, processor, scans):
    shards, other = Path(data.train[0]), KINDS[kind](processor)
    assert build(data, processor) == shards / "index"
    assert build(data, other) == shards / f"index-{fingerprint(other)}"
    assert len(scans) == 4
    for _ in range(2):
        for one in (processor, other):
            assert open_index(build(data, one)).fingerprint == fingerprint(one)
    assert len(scans) == 4
    assert not list(shards.glob("*.parts"))


def test_an_index_that_grows_leaves_the_others_alone(data, processor):
    other, shards = other_template(processor), Path(data.train[0])
    build(data, processor), build(data, other)
    before = (shards / "index" / "manifest.json").read_bytes()
    write_shard(shards / "2.tar", [good("new")])
    assert len(open_index(build(data, other))) == 7
    assert (shards / "index" / "manifest.json").read_bytes() == before
    assert len(open_index(build(data, processor))) == 7


def test_a_named_index_goes_on_being_used_when_the_first_is_gone(data, processor, scans):
    other, shards = other_template(processor), Path(data.train[0])
    build(data, processor), build(data, other)
    (shards / "index" / "manifest.json").unlink()
    assert build(data, other) == shards / f"index-{fingerprint(other)}" and len(scans) == 4


def test_rebuilding_takes_one_index_anew(data, processor, scans):
    other, shards = other_template(processor), Path(data.train[0])
    build(data, processor), build(data, other)
    stamp = (shards / "index" / "manifest.json").stat().st_mtime_ns
    index_sources(data, other, Alone(), rebuild=True, say=lambda text: None)
    assert len(scans) == 6 and (shards / "index" / "manifest.json").stat().st_mtime_ns == stamp


def test_where_shards_cannot_be_written_the_second_index_is_in_the_cache(data, processor, monkeypatch):
    """Root may write everywhere: for it, and only then, the answer to the question for leave stands in for the folder's mode."""
    shards = Path(data.train[0])
    build(data, processor)
    if os.geteuid() == 0:
        allowed = os.access
        refused = lambda path, mode: Path(path) == shards and mode & os.W_OK  # noqa: E731
        monkeypatch.setattr(
            os, "access", lambda path, mode, **more: not refused(path, mode) and allowed(path, mode, **more)
        )
    shards.chmod(0o555)
    try:
        assert build(data, processor) == shards / "index"
        assert Path(data.cache_dir) in build(data, other_template(processor)).parents
    finally:
        shards.chmod(0o755)


def test_who_comes_while_another_builds_takes_a_folder_of_its_own(data, processor):
    """The first is at work in `index`; the second neither waits for it nor takes its parts."""
    other, shards = other_template(processor), Path(data.train[0])
    located = locate_sources(data)[0].shards
    with sole_builder(located, data.cache_dir, fingerprint(processor)) as folder:
        assert folder == shards / "index" and parts_folder(folder).exists()
        assert index_folder(located, data.cache_dir, fingerprint(other)) == shards / f"index-{fingerprint(other)}"
        assert build(data, other) == shards / f"index-{fingerprint(other)}"
        assert parts_folder(folder).exists()
    assert build(data, processor) == shards / "index"


JOB = """
import pickle, sys
from tokenflex.config import DataConfig
from tokenflex.data.index import open_index
from tokenflex.data.sources import build_indexes, locate_sources
data, processor = pickle.load(open(sys.argv[1], "rb"))
print("ready", flush=True); input()
(folder,) = build_indexes(locate_sources(data), processor, data)
print(folder, len(open_index(folder)), open_index(folder).fingerprint, flush=True)
"""


def test_two_jobs_with_two_tokenizers_at_once(data, processor, tmp_path):
    processors = [processor, other_vocabulary(processor)]
    jobs = []
    for number, one in enumerate(processors):
        (tmp_path / f"{number}.pkl").write_bytes(pickle.dumps((data, one)))
        command = [sys.executable, "-c", JOB, str(tmp_path / f"{number}.pkl")]
        jobs.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for job in jobs:
        assert job.stdout.readline() == "ready\n"
    with futures.ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda job: job.communicate("go\n", timeout=120)[0].split(), jobs))
    assert len({folder for folder, _, _ in ends}) == 2
    assert [(number, print_) for _, number, print_ in ends] == [("6", fingerprint(one)) for one in processors]


def test_the_command_lists_and_removes(data, processor, tmp_path, capsys):
    other, shards = other_template(processor), Path(data.train[0])
    build(data, processor), build(data, other)
    part = [str(shards / "0.tar")]  # of a part of the folder: in the cache
    load_or_build_index(part, processor, index_folder(part, data.cache_dir, fingerprint(processor)), LIMITS)
    command = lambda *words: cli.main(["data", "index", *words, f"--cache-dir={data.cache_dir}"])  # noqa: E731
    assert command("ls", str(shards)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [fingerprint(processor), fingerprint(other)]
    assert all("6 samples of 2 shards (0 bad ones left out)" in line for line in lines)
    assert command("rm", str(shards), "--fingerprint", "zz") == 2
    assert (
        f"0 indexes have the fingerprint zz; wanted one of those there: {fingerprint(processor)}"
        in capsys.readouterr().err
    )
    assert command("rm", str(shards), "--fingerprint", fingerprint(processor)) == 0
    assert not (shards / "index").exists() and (shards / f"index-{fingerprint(other)}").exists()
    assert command("ls", *part) == 0 and fingerprint(processor) in capsys.readouterr().out
    assert command("rm", str(shards), "--all") == 0
    capsys.readouterr()
    assert command("ls", str(shards)) == 0 and capsys.readouterr().out == "there is none\n"
    assert sorted(path.name for path in shards.glob("*.tar")) == ["0.tar", "1.tar"]


def test_planning_from_an_index_that_is_not_there_names_those_beside_it(data, processor):
    other, shards = other_template(processor), Path(data.train[0])
    build(data, processor), build(data, other)
    (shards / "index" / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"no index there.*there is .*index-{fingerprint(other)}"):
        open_index(shards / "index")


def test_an_index_says_the_same_in_whichever_folder_it_lies(data, processor):
    folder = build(data, processor)
    other = other_template(processor)
    build(data, other)
    named, first = open_index(build(data, other)), open_index(folder)
    np.testing.assert_array_equal(named.offset, first.offset)
    assert (np.asarray(named.text_tokens) >= np.asarray(first.text_tokens)).all()
