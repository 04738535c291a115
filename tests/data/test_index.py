"""The index: says what the processor encodes, grows with new shards, and refuses what it was not made for."""

import http.server
import json
import os
import subprocess
import sys
import threading
from concurrent import futures
from functools import partial

import numpy as np
import pytest
from test_shards import LIMITS, good, png, write_shard

from tokenflex.budget import VisualTokenBudget
from tokenflex.config import DataConfig
from tokenflex.data import PackDataset, find_shards, load_index, load_or_build_index
from tokenflex.data.index import (
    COLUMNS,
    RAGGED,
    ShardScanner,
    build_index,
    fingerprint,
    freshness,
    parts_folder,
)
from tokenflex.data.loader import micro_batches
from tokenflex.data.remote import RemoteShard, locate_shards
from tokenflex.data.scan import scan_shard
from tokenflex.errors import UserError
from tokenflex.plan import Mixture, Planner, Position, Source

EVERY_COLUMN = (*COLUMNS, *RAGGED)


def long_talk(key, num_answers, images_in=(0,)):
    """A conversation of several answers, with an image in the given questions."""
    messages = []
    for turn in range(num_answers):
        content = [{"type": "image"}] * (turn in images_in) + [{"type": "text", "text": f"digit at A{turn}"}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": "seven " * (turn + 1)}]
    images = {f"{i}.png": png((20 + i, 30)) for i in range(len(images_in))}
    return key, {"json": {"messages": messages}, **images}


def assert_same_index(one, two):
    for column in EVERY_COLUMN:
        np.testing.assert_array_equal(getattr(one, column), getattr(two, column))


@pytest.fixture
def shards(tmp_path):
    return [
        write_shard(tmp_path / f"{n}.tar", [good(f"{n}{i}", images=(n + i) % 3) for i in range(4)]) for n in range(3)
    ]


def test_the_planner_reads_at_most_16_bytes_per_sample():
    assert sum(np.dtype(COLUMNS[name]).itemsize for name in ("text_tokens", "learned_tokens", "num_tiles")) <= 16


def test_image_sizes_come_from_the_headers(tmp_path, processor):
    shard = write_shard(tmp_path / "s.tar", [long_talk("a", 3, images_in=(0, 2)), good("b", images=0), good("c")])
    index = load_or_build_index([shard], processor, tmp_path / "index", LIMITS)
    np.testing.assert_array_equal(index.image_sizes, [[30, 20], [30, 21], [8, 8]])
    np.testing.assert_array_equal(index.num_images, [2, 0, 1])
    np.testing.assert_array_equal(index.num_tiles, [2, 0, 1])


def test_an_image_that_cannot_be_read_does_not_end_the_index(tmp_path, processor):
    key, members = good("a")
    members["0.png"] = b"no image"
    shard = write_shard(tmp_path / "s.tar", [(key, members), good("b")])
    index = load_or_build_index([shard], processor, tmp_path / "index", LIMITS)
    assert len(index) == len(index.image_sizes) == 1 and index.num_skipped() == 1
    assert index.entries[0]["skipped"][0]["key"] == "a"


def test_added_shards_are_the_only_ones_read(shards, tmp_path, processor, monkeypatch):
    folder, scanned = tmp_path / "index", []
    scan = ShardScanner.__call__
    monkeypatch.setattr(ShardScanner, "__call__", lambda self, shard: scanned.append(shard.name) or scan(self, shard))
    load_or_build_index(shards[:2], processor, folder, LIMITS)
    assert scanned == ["0.tar", "1.tar"]
    grown = load_or_build_index([shards[2], *shards[:2]], processor, folder, LIMITS)
    assert scanned[2:] == ["2.tar"]
    load_or_build_index([shards[2], *shards[:2]], processor, folder, LIMITS)
    assert scanned[3:] == []
    build_index([shards[2], *shards[:2]], processor, tmp_path / "anew", LIMITS)
    assert_same_index(grown, load_index(tmp_path / "anew", [shards[2], *shards[:2]], processor))
    fewer = load_or_build_index(shards[1:2], processor, folder, LIMITS)
    assert len(fewer) == 4 and len(scanned) == 6
    assert not parts_folder(folder).exists()


def test_cuts_follow_their_samples_when_an_index_grows(tmp_path, processor):
    shards = [write_shard(tmp_path / f"{n}.tar", [good("x"), long_talk("a", n + 2)]) for n in range(3)]
    grown = load_or_build_index(shards[:2], processor, tmp_path / "index", LIMITS)
    grown = load_or_build_index([shards[2], shards[1]], processor, tmp_path / "index", LIMITS)
    build_index([shards[2], shards[1]], processor, tmp_path / "anew", LIMITS)
    assert_same_index(grown, load_index(tmp_path / "anew", [shards[2], shards[1]], processor))
    np.testing.assert_array_equal(grown.cuts[:, 0], [1, 1, 1, 3, 3])


def test_a_stopped_build_goes_on_where_it_was(shards, tmp_path, processor, monkeypatch):
    folder, read = tmp_path / "index", []

    def scan(path, limits):
        read.append(path.name)
        if read == ["0.tar", "1.tar"]:
            raise KeyboardInterrupt
        return scan_shard(path, limits)

    monkeypatch.setattr("tokenflex.data.shards.scan_shard", scan)
    with pytest.raises(KeyboardInterrupt):
        build_index(shards, processor, folder, LIMITS)
    assert not folder.exists()
    build_index(shards, processor, folder, LIMITS)
    assert read == ["0.tar", "1.tar", "1.tar", "2.tar"]
    assert len(load_index(folder, shards, processor)) == 12


def test_a_changed_shard_is_an_error_with_both_checksums_until_indexed_again(shards, tmp_path, processor, monkeypatch):
    folder = tmp_path / "index"
    before = load_or_build_index(shards, processor, folder, LIMITS).entries[1]["sha256"]
    os.utime(shards[1])  # touched, not changed: its bytes decide, once
    hashed, sha256 = [], freshness.file_sha256
    monkeypatch.setattr(freshness, "file_sha256", lambda path: hashed.append(path.name) or sha256(path))
    for _ in range(2):
        load_or_build_index(shards, processor, folder, LIMITS)
    assert hashed == ["1.tar"]
    write_shard(shards[1], [good("other")])
    now = freshness.file_sha256(shards[1])
    with pytest.raises(UserError, match=rf"1.tar has changed.*{before[:16]}.*{now[:16]}.*launch/index.py"):
        load_or_build_index(shards, processor, folder, LIMITS)
    build_index(shards, processor, folder, LIMITS)
    assert len(load_or_build_index(shards, processor, folder, LIMITS)) == 9


@pytest.mark.parametrize("part", ["template", "image tokens"])
def test_an_index_of_another_tokenizer_or_template_is_an_error_with_both_fingerprints(
    part, shards, tmp_path, processor
):
    import copy

    folder, other = tmp_path / "index", copy.copy(processor)
    load_or_build_index(shards, processor, folder, LIMITS)
    if part == "template":
        other.chat_template = processor.chat_template + " "
    else:
        other.image_start_token = "<|im_start|>"
    assert fingerprint(other) != fingerprint(processor)
    with pytest.raises(UserError, match=f"{fingerprint(processor)}.*{fingerprint(other)}.*--rebuild"):
        load_or_build_index(shards, other, folder, LIMITS)


def test_a_conversation_is_cut_after_the_last_answer_that_fits(tmp_path, processor):
    """Truncation: planned, read and learned are the same shorter conversation, never cut inside an image."""
    talk = long_talk("a", 6, images_in=(0, 1, 2, 3, 4, 5))
    shard = write_shard(tmp_path / "s.tar", [talk, *(good(str(i)) for i in range(12))])
    index = load_or_build_index([shard], processor, tmp_path / "index", LIMITS)
    full = int(index.text_tokens[0]) + 6 * 12
    cut = int(index.cuts[3, 2]) + 4 * 12  # four answers, four images
    data = DataConfig(pack_length=cut + 3, max_images_per_pack=8, packs_per_step=2, lockstep_packs=2)
    assert cut + 3 < full
    mixture = Mixture([Source(index=index, over_long="truncate")])
    planner = Planner(mixture, VisualTokenBudget(counts=(12,), probabilities=(1.0,)), data, 0, "token")
    dataset = PackDataset(mixture, processor, "token", blank_count=4, limits=LIMITS)
    found = 0
    for step in planner.epoch_steps(0):
        for plan in micro_batches([step], 0, 1, 2):
            batch = dataset.batch(plan)
            assert float(batch.weights.sum()) == step.total_weight
            for place in np.flatnonzero(plan.sample_ids == 0):
                found += 1
                assert plan.num_messages[place] == 8
                assert int(batch.cu_seq_lens.diff()[place]) == cut
                assert len(dataset.sample(0, 8).images) == 4
    assert found == 1
    with pytest.raises(UserError, match="data.over_long=drop"):
        Planner(index, VisualTokenBudget(counts=(12,), probabilities=(1.0,)), data, 0, "token")


@pytest.fixture
def server(tmp_path):
    """A real HTTP server of the folder `www`; `requests` are what it was asked for."""
    (tmp_path / "www").mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            asked.append((self.command, self.path))

        def log_error(self, *arguments):
            """Tests ask for what is not there."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "www")) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", tmp_path / "www", asked
        running.shutdown()


def test_remote_shards_give_what_local_ones_give_and_are_fetched_once(server, tmp_path, processor):
    url, folder, asked = server
    names = [write_shard(folder / f"s-00{n}.tar", [good(f"{n}{i}", images=i) for i in range(3)]) for n in range(2)]
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    shards = locate_shards([f"{url}/s-{{000..001}}.tar"], data)
    assert [str(shard) for shard in shards] == [f"{url}/s-000.tar", f"{url}/s-001.tar"]
    remote = load_or_build_index(shards, processor, tmp_path / "remote", LIMITS)
    local = load_or_build_index(names, processor, tmp_path / "local", LIMITS)
    assert_same_index(remote, local)
    one, two = PackDataset(remote, processor, "sqrt", 4, LIMITS), PackDataset(local, processor, "sqrt", 4, LIMITS)
    for sample in range(6):
        assert one.sample(sample) == two.sample(sample)
    assert sorted(path for kind, path in asked if kind == "GET") == ["/s-000.tar", "/s-001.tar"]


def test_the_cache_of_remote_shards_keeps_its_limit(server, tmp_path):
    url, folder, asked = server
    for n in range(4):
        write_shard(folder / f"{n}.tar", [good(str(n))])
    size = (folder / "0.tar").stat().st_size
    cached = [RemoteShard(f"{url}/{n}.tar", str(tmp_path / "cache"), 2 * size) for n in range(4)]
    for number, shard in enumerate(cached):
        path = shard.local_file()
        os.utime(path, (number, number))
        assert path.read_bytes() == (folder / f"{number}.tar").read_bytes()
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    assert cached[3].local_file().exists() and asked.count(("GET", "/3.tar")) == 1
    cached[0].local_file()
    assert asked.count(("GET", "/0.tar")) == 2


@pytest.mark.parametrize(
    "source, part",
    [
        ("pipe:cat x.tar", "scheme 'pipe'"),
        ("s3://bucket/x.tar", "scheme 's3'.*http"),
        ("file:///etc/x.tar", "scheme 'file'"),
    ],
)
def test_other_schemes_are_refused(source, part):
    with pytest.raises(UserError, match=part):
        locate_shards([source], DataConfig())


def test_a_server_without_the_shard_or_without_answer_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenflex.data.remote.WAITS_S", (0.01,))
    url, _, _ = server
    with pytest.raises(UserError, match="none.tar: the server answers 404"):
        RemoteShard(f"{url}/none.tar", str(tmp_path), 1).local_file()
    with pytest.raises(UserError, match="cannot be fetched"):
        RemoteShard("http://127.0.0.1:9/none.tar", str(tmp_path), 1).stamp()


def test_the_manifest_says_what_the_planner_asks_before_it_plans(tmp_path, processor):
    shard = write_shard(tmp_path / "s.tar", [long_talk("a", 3, (0, 1)), good("b"), good("c", images=0)])
    index = load_or_build_index([shard], processor, tmp_path / "index", LIMITS)
    text = np.asarray(index.text_tokens)
    np.testing.assert_array_equal(index.longest_text(), [text[2], text[1], text[0]])
    assert index.num_answered() == 3
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert manifest["shards"][0]["sha256"] == freshness.file_sha256(shard)
    planner_ids = [
        pack.sample_ids
        for step in Planner(
            index,
            VisualTokenBudget(counts=(4,), probabilities=(1.0,)),
            DataConfig(pack_length=2000, packs_per_step=2, lockstep_packs=2),
            0,
            "sqrt",
        ).epoch_steps(0)
        for pack in step.packs
    ]
    np.testing.assert_array_equal(np.sort(np.concatenate(planner_ids)), [0, 1, 2])
    assert Position(**Position().as_dict()) == Position()


def test_a_second_builder_waits_for_the_first(corpus, processor, tmp_path):
    """Two jobs that start together on new shards: parts that one has made are not taken away by the other."""
    folder = tmp_path / "index"
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "index.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with futures.ThreadPoolExecutor(1) as pool:
            built = pool.submit(load_or_build_index, find_shards([str(corpus / "train")]), processor, folder, LIMITS)
            with pytest.raises(futures.TimeoutError):
                built.result(timeout=1)
            assert not folder.exists()
            other.communicate("done\n")
            assert len(built.result(timeout=60)) == 60
