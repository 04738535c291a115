"""An index that an earlier release wrote goes on being used: opened with its own processor, without reading a shard again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tokenflex.config import DataConfig
from tokenflex.data import Limits, PackDataset, load_index, load_or_build_index
from tokenflex.data.index import fingerprint, open_index
from tokenflex.data.loader import MicroBatchPlan
from tokenflex.data.sources import build_indexes, locate_sources
from tokenflex.model import TokenFlexProcessor
from tokenflex.plan import Position

RELEASES = sorted(path for path in Path(__file__).parent.iterdir() if path.is_dir() and path.name[0].isdigit())


@pytest.fixture(params=RELEASES, ids=lambda path: path.name)
def release(request, tmp_path, monkeypatch):
    """A copy of what a release wrote, of which no shard may be scanned."""
    shutil.copytree(request.param, tmp_path / "release")
    monkeypatch.setattr("tokenflex.data.shards.scan_shard", lambda path, limits: pytest.fail(f"{path} is read again"))
    return tmp_path / "release"


@pytest.fixture
def processor(release):
    return TokenFlexProcessor.from_pretrained(release / "model")


def test_it_is_the_index_of_its_own_processor(release, processor):
    manifest = json.loads((release / "shards" / "index" / "manifest.json").read_text())
    assert fingerprint(processor) == manifest["fingerprint"]


def test_a_run_takes_it_as_it_is(release, processor):
    data = DataConfig(train=(str(release / "shards"),), cache_dir=str(release / "cache"))
    (folder,) = build_indexes(locate_sources(data), processor, data)
    assert folder == release / "shards" / "index"
    index = open_index(folder)
    assert len(index) == sum(entry["num_samples"] for entry in index.entries) > 0


def test_its_lengths_are_those_of_its_samples(release, processor):
    shards = sorted((release / "shards").glob("*.tar"))
    index = load_or_build_index(shards, processor, release / "shards" / "index", Limits())
    dataset = PackDataset(load_index(release / "shards" / "index", shards, processor), processor, "sqrt", 4, Limits())
    counts = np.where(index.num_tiles > 0, 4, 0)
    batch = dataset.batch(MicroBatchPlan(Position(), True, np.arange(len(index)), counts, 1.0))
    assert not batch.skipped
    np.testing.assert_array_equal(batch.cu_seq_lens.diff().numpy(), index.text_tokens + counts * index.num_tiles)
