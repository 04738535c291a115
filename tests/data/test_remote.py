"""Shards behind http: a copy is never taken for another, what may pass is tried again, what does not is one line."""

import http.server
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from test_shards import LIMITS, good, write_shard

from tokenflex.config import DataConfig
from tokenflex.data import PackDataset, load_or_build_index, remote
from tokenflex.data.loader import MicroBatchPlan
from tokenflex.data.remote import WAITS_S, RemoteShard, locate_shards
from tokenflex.data.sources import build_indexes, locate_sources
from tokenflex.errors import UserError
from tokenflex.plan import Position


class Host:
    """A real server of a folder that misbehaves as it is told to; `asked` is what was asked for."""

    def __init__(self, folder):
        self.folder, self.asked, self.faults = folder, [], []
        self.tags = True
        """Whether it sends entity tags."""
        self.head = 200
        """What it answers to HEAD."""
        self.ranges = True

    def transfers(self):
        return [path for kind, path, is_part in self.asked if kind == "GET" and not is_part]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):  # noqa: N802
        self._answer(has_body=False)

    def do_GET(self):  # noqa: N802
        self._answer(has_body=True)

    def log_message(self, *arguments):
        """Quiet."""

    def _answer(self, has_body):
        host, path = self.server.host, self.path.partition("?")[0]
        is_part = "Range" in self.headers
        host.asked.append((self.command, path, is_part))
        if not has_body and host.head != 200:
            return self.send_error(host.head)
        fault = host.faults.pop(0) if has_body and not is_part and host.faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        if fault == "hang up":
            return self.connection.close()
        file = host.folder / path.lstrip("/")
        if not file.exists():
            return self.send_error(404)
        data = file.read_bytes()
        is_range = is_part and host.ranges
        self.send_response(206 if is_range else 200)
        if host.tags:
            self.send_header("ETag", f'"{hash(data):x}"')
        if is_range:
            self.send_header("Content-Range", f"bytes 0-0/{len(data)}")
        self.send_header("Content-Length", "1" if is_range else str(len(data)))
        self.send_header("Last-Modified", self.date_time_string(file.stat().st_mtime))
        self.end_headers()
        if has_body:
            self.wfile.write(data[:1] if is_range else data[: len(data) // 2] if fault == "cut" else data)
        return None


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "WAITS_S", (0.01,) * len(WAITS_S))
    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.host = host = Host(tmp_path / "www")
        host.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield host
        server.shutdown()


def put(host, *keys, name="s.tar"):
    return write_shard(host.folder / name, [good(key) for key in keys])


def shard_of(host, tmp_path, name="s.tar"):
    return RemoteShard(f"{host.url}/{name}", str(tmp_path / "cache"), 10**9)


def left_in(cache):
    """Files of the cache that are neither copies nor locks."""
    return [path.name for path in cache.glob("*") if path.suffix not in (".tar", ".lock")] if cache.exists() else []


# What may pass


@pytest.mark.parametrize("fault", [503, 429, 500, 502, 504, "cut", "hang up"])
@pytest.mark.parametrize("times", [1, len(WAITS_S)])
def test_what_may_pass_is_tried_again(fault, times, host, tmp_path):
    whole = put(host, "a", "b").read_bytes()
    host.faults = [fault] * times
    assert shard_of(host, tmp_path).local_file().read_bytes() == whole
    assert len(host.transfers()) == times + 1 and not left_in(tmp_path / "cache")


@pytest.mark.parametrize(
    "fault, part",
    [
        (503, "answers 503"),
        ("cut", r"ended after \d+ of \d+ bytes|was cut off"),
        ("hang up", "cannot be fetched|cut off"),
    ],
)
def test_what_does_not_pass_ends_in_one_line_and_leaves_nothing(fault, part, host, tmp_path):
    put(host, "a")
    host.faults = [fault] * 99
    with pytest.raises(UserError, match=part) as error:
        shard_of(host, tmp_path).local_file()
    assert "\n" not in str(error.value) and str(error.value).startswith(host.url)
    assert f"{len(WAITS_S) + 1} times in a row" in str(error.value) and len(host.transfers()) == len(WAITS_S) + 1
    assert not left_in(tmp_path / "cache") and not list((tmp_path / "cache").glob("*.tar"))


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_a_refusal_is_final(code, host, tmp_path):
    put(host, "a")
    shard = shard_of(host, tmp_path)
    shard = shard.at(shard.stamp())
    host.faults = [code] * 9
    with pytest.raises(UserError, match=f"the server answers {code}"):
        shard.local_file()
    assert len(host.transfers()) == 1 and not left_in(tmp_path / "cache")


def test_a_server_that_is_not_there_is_one_line(host, tmp_path):
    with pytest.raises(UserError, match="cannot be fetched .*is the address right and the server up.*in a row"):
        RemoteShard("http://127.0.0.1:9/s.tar", str(tmp_path), 1).stamp()


def test_what_a_killed_process_left_is_cleared(host, tmp_path):
    put(host, "a")
    path = shard_of(host, tmp_path).local_file()
    left = path.with_name(f"{path.name}.0011.tmp")
    path.rename(left)
    assert shard_of(host, tmp_path).local_file() == path and not left.exists()


def test_a_cache_that_cannot_be_written_is_named(host, tmp_path):
    put(host, "a")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="set data.cache_dir to a folder that can be written"):
        shard_of(host, tmp_path).local_file()


# Addresses that are signed for one method


@pytest.mark.parametrize("code", [400, 401, 403, 404, 405, 501])
@pytest.mark.parametrize("ranges", [True, False])
def test_where_head_is_refused_a_part_of_a_get_tells_the_same(code, ranges, host, tmp_path):
    put(host, "a")
    usual = shard_of(host, tmp_path).stamp()
    host.head, host.ranges = code, ranges
    assert shard_of(host, tmp_path).stamp() == usual
    assert shard_of(host, tmp_path).local_file().exists()


def test_a_head_that_may_pass_is_tried_again_as_head(host, tmp_path):
    put(host, "a")
    host.head = 503
    with pytest.raises(UserError, match="answers 503"):
        shard_of(host, tmp_path).stamp()
    assert [kind for kind, _, _ in host.asked] == ["HEAD"] * (len(WAITS_S) + 1)


# A shard that has been replaced


@pytest.mark.parametrize("tags", [True, False])
def test_a_replaced_shard_is_not_the_copy_of_before(tags, host, tmp_path):
    host.tags = tags
    first = put(host, "a").read_bytes()
    shard = shard_of(host, tmp_path)
    before = shard.stamp()
    assert shard.local_file().read_bytes() == first
    second = put(host, "a", "b", "c").read_bytes()
    assert shard.local_file().read_bytes() == second and len(host.transfers()) == 2
    assert shard.at(before).local_file().read_bytes() == first  # who was made for the old one still has it
    assert len(host.transfers()) == 2


def test_one_of_the_same_size_is_told_by_its_tag(host, tmp_path):
    put(host, "a")
    shard = shard_of(host, tmp_path)
    copy = shard.local_file()
    second = put(host, "b").read_bytes()
    assert len(second) == copy.stat().st_size
    assert shard.local_file().read_bytes() == second


def test_an_index_of_a_replaced_shard_is_refused_and_its_manifest_stays(host, tmp_path, processor):
    put(host, "a", "b")
    shard = shard_of(host, tmp_path)
    load_or_build_index([shard], processor, tmp_path / "index", LIMITS)
    manifest = (tmp_path / "index" / "manifest.json").read_bytes()
    put(host, "c", "d", "e")
    for _ in range(2):
        with pytest.raises(UserError, match="s.tar has changed since: sha256"):
            load_or_build_index([shard], processor, tmp_path / "index", LIMITS)
        assert (tmp_path / "index" / "manifest.json").read_bytes() == manifest


def test_touched_on_the_server_is_not_changed(host, tmp_path, processor):
    host.tags = False
    path = put(host, "a", "b")
    shard = shard_of(host, tmp_path)
    load_or_build_index([shard], processor, tmp_path / "index", LIMITS)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    index = load_or_build_index([shard], processor, tmp_path / "index", LIMITS)
    assert len(index) == 2 and "2001" in index.entries[0]["etag"]
    num_transfers = len(host.transfers())
    load_or_build_index([shard], processor, tmp_path / "index", LIMITS)
    assert len(host.transfers()) == num_transfers


def test_replaced_while_a_run_reads_is_an_error_not_other_samples(host, tmp_path, processor):
    """The copy has left the cache, and the server has another shard by now."""
    put(host, "a", "b")
    shard = shard_of(host, tmp_path)
    index = load_or_build_index([shard], processor, tmp_path / "index", LIMITS)
    plan = MicroBatchPlan(Position(), True, np.array([0, 1]), np.array([4, 4]), 1.0)
    assert not PackDataset(index, processor, "sqrt", 4, LIMITS).batch(plan).skipped
    put(host, "c", "d", "e")
    assert not PackDataset(index, processor, "sqrt", 4, LIMITS).batch(plan).skipped  # the copy is there
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"has been replaced since it was indexed: \d+ bytes.*index again") as error:
        PackDataset(index, processor, "sqrt", 4, LIMITS).batch(plan)
    assert "\n" not in str(error.value) and not left_in(tmp_path / "cache")


def test_stamp_and_checksum_of_a_manifest_belong_together(host, tmp_path, processor, monkeypatch):
    """The server changes between the first question and the transfer: no entry with the size of one and the bytes of the other."""
    put(host, "a")
    ask = remote._stamp_on_server

    def asked_then_replaced(url):
        stamp = ask(url)
        put(host, "b", "c")
        return stamp

    monkeypatch.setattr(remote, "_stamp_on_server", asked_then_replaced)
    with pytest.raises(UserError, match="has been replaced"):
        load_or_build_index([shard_of(host, tmp_path)], processor, tmp_path / "index", LIMITS)
    monkeypatch.setattr(remote, "_stamp_on_server", ask)
    index = load_or_build_index([shard_of(host, tmp_path)], processor, tmp_path / "index", LIMITS)
    (entry,) = index.entries
    assert entry["size"] == (host.folder / "s.tar").stat().st_size and entry["num_samples"] == 2


def test_an_index_that_knows_no_tags_goes_on(host, tmp_path, processor):
    """Earlier releases wrote an empty tag where the server sent none."""
    host.tags = False
    put(host, "a")
    shard = shard_of(host, tmp_path)
    load_or_build_index([shard], processor, tmp_path / "index", LIMITS)
    path = tmp_path / "index" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["etag"] = ""
    path.write_text(json.dumps(manifest))
    assert len(load_or_build_index([shard], processor, tmp_path / "index", LIMITS)) == 1
    assert json.loads(path.read_text())["shards"][0]["etag"]


def test_sources_behind_urls_are_indexed_in_the_cache(host, tmp_path, processor):
    for n in range(3):
        put(host, f"{n}a", f"{n}b", name=f"p-00{n}.tar")
    host.faults = [503, "cut"]
    data = DataConfig(train=(f"{host.url}/p-{{000..002}}.tar",), cache_dir=str(tmp_path / "cache"))
    (folder,) = build_indexes(locate_sources(data), processor, data)
    assert Path(data.cache_dir) in folder.parents
    assert [shard.name for shard in locate_shards(data.train, data)] == [f"{host.url}/p-00{n}.tar" for n in range(3)]
    assert len(re.findall("num_samples", (folder / "manifest.json").read_text())) == 3
