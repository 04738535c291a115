"""Shards behind http(s): fetched whole into a local cache, a shard at a time, and read from there like any other.

Samples are shuffled inside blocks of shards, so a shard that has been fetched is read many times before the next. Only
http and https are opened: no scheme here starts a program.
"""

import contextlib
import hashlib
import http.client
import os
import re
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from ..config import DataConfig
from ..errors import UserError
from ..files import only_one_inside
from .shards import Shard, Stamp, Tar, as_shards, find_shards

SCHEMES = ("http", "https")
TIMEOUT_S = 60
WAITS_S = (0.5, 2.0, 8.0)
"""Before each further try of what may pass: a server that is busy or restarts, a connection that is cut."""
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request may succeed."""
NO_HEAD = (400, 401, 403, 404, 405, 501)
"""Answers to a HEAD request after which a GET is tried: an address that is signed for GET refuses other methods."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteShard(Tar):
    """A shard at a URL; `cache` is the folder that it is fetched into, of `cache_bytes` at most.

    expected: the stamp (`size`, `etag`) that it must have; empty for whatever is there now.
    """

    url: str
    cache: str
    cache_bytes: int
    expected: tuple = ()

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url

    @property
    def address(self) -> str:
        return self.url

    @property
    def folder(self) -> Path | None:
        return None

    def at(self, stamp: Stamp) -> Shard:
        return replace(self, expected=tuple(sorted(stamp.items())))

    def stamp(self) -> Stamp:
        """Size and entity tag (or, without one, the time of the last change) as the server gives them.

        Raises:
            UserError: the server does not answer for it.
        """
        return _trying(self.url, lambda: _stamp_on_server(self.url))

    def local_file(self) -> Path:
        """Path of the local copy, fetched where it is not there; several processes may ask at once.

        A copy is kept under the stamp that it had: one of a shard that has been replaced is not taken for it.

        Raises:
            UserError: the server does not answer, ends before the last byte, or has another shard there by now.
        """
        stamp = dict(self.expected) or self.stamp()
        folder = Path(self.cache).expanduser()
        key = "\0".join([self.url, *(f"{name}={value}" for name, value in sorted(stamp.items()))])
        name = hashlib.sha256(key.encode()).hexdigest()[:16] + "-" + PurePosixPath(urlsplit(self.url).path).name
        path = folder / name
        if path.exists():
            os.utime(path)  # the cache drops what was used longest ago
            return path
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; set data.cache_dir to a folder that can be written") from None
        with only_one_inside(folder / f"{name}.lock"):  # one process of a node fetches, the others wait for it
            if not path.exists():
                for left in folder.glob(f"{name}.*.tmp"):  # of a process that was killed: nobody else is inside
                    left.unlink(missing_ok=True)
                _trying(self.url, lambda: _download(self.url, stamp, path))
                _make_room(folder, self.cache_bytes, keep=path)
        return path


class _Passing(Exception):
    """What went wrong may go right at the next try; the message is the user's if it does not."""


def _trying(url: str, work: Callable[[], Result]) -> Result:
    """`work()`, tried again a few times where it fails in a way that may pass.

    Raises:
        UserError: it failed each time, in one line.
    """
    for wait_s in WAITS_S:
        try:
            return work()
        except _Passing:
            time.sleep(wait_s)
    try:
        return work()
    except _Passing as problem:
        raise UserError(f"{url}: {problem}, {len(WAITS_S) + 1} times in a row") from None


def _stamp_on_server(url: str) -> Stamp:
    try:
        with _request(url, method="HEAD") as answer:
            return _stamp_of(answer, answer.headers.get("Content-Length"))
    except urllib.error.HTTPError as error:
        if error.code not in NO_HEAD:
            raise _refused(url, error) from None
    try:
        with _request(url, Range="bytes=0-0") as answer:
            partial = re.fullmatch(r"bytes 0-0/(\d+)", answer.headers.get("Content-Range", ""))
            return _stamp_of(answer, partial[1] if partial else answer.headers.get("Content-Length"))
    except urllib.error.HTTPError as error:
        raise _refused(url, error) from None


def _stamp_of(answer: Any, size: str | None) -> Stamp:
    tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    return {"size": int(size or 0), "etag": tag}


def _download(url: str, stamp: Stamp, path: Path) -> None:
    """Put the shard of this stamp at `path`, whole or not at all.

    Raises:
        UserError: the server has another one, or refuses.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _request(url) as answer:
            length = answer.headers.get("Content-Length")
            found = _stamp_of(answer, length or str(stamp["size"]))
            if found != {**stamp, "etag": stamp.get("etag") or found["etag"]}:
                raise UserError(
                    f"{url}: has been replaced since it was indexed: {_words(stamp)} then, {_words(found)} now; restore it, or "
                    "index again: python launch/index.py --config RECIPE"
                )
            with open(temporary, "wb") as file:
                size = _copy(answer, file)
        if length is not None and size != int(length):
            raise _Passing(f"ended after {size} of {length} bytes; look at the server or the connection")
        os.replace(temporary, path)
    except urllib.error.HTTPError as error:
        raise _refused(url, error) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; wanted room and a right to write for a copy of {url}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _copy(answer: Any, file: BinaryIO) -> int:
    """Copy what the server sends; returns its bytes.

    Raises:
        _Passing: the connection broke.
    """
    while True:
        try:
            chunk = answer.read(2**20)
        except (http.client.HTTPException, OSError) as error:
            raise _Passing(f"was cut off ({' '.join(str(error).split()) or type(error).__name__})") from None
        if not chunk:
            return file.tell()
        file.write(chunk)


def _words(stamp: Stamp) -> str:
    return f"{stamp.get('size')} bytes, tag {stamp.get('etag') or 'none'}"


def _request(url: str, method: str = "GET", **headers: str) -> Any:
    """The server's answer, open.

    Raises:
        HTTPError: an answer that is final. _Passing: one that is not, or none.
    """
    try:
        return urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with contextlib.closing(error):
            if error.code in PASSING:
                raise _Passing(f"the server answers {error.code} {error.reason}") from None
            raise
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        raise _Passing(f"cannot be fetched ({reason}); is the address right and the server up?") from None


def _refused(url: str, error: urllib.error.HTTPError) -> UserError:
    return UserError(f"{url}: the server answers {error.code} {error.reason}; wanted a shard there")


def _make_room(folder: Path, limit: int, keep: Path) -> None:
    """Remove the copies used longest ago until the cache is within its limit. A reader that has one open keeps it."""
    copies = sorted((path for path in folder.glob("*.tar")), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in copies)
    for path in copies:
        if total <= limit:
            break
        if path != keep:
            total -= path.stat().st_size
            path.unlink(missing_ok=True)


def locate_shards(sources: Sequence[str], data: DataConfig, what: str = "data.train") -> list[Shard]:
    """Shards of paths, folders, patterns and http(s) URLs; `{000..127}` in a URL stands for every number.

    Raises:
        UserError: a source without any shard, or a URL of another scheme.
    """
    shards: list[Shard] = []
    for source in sources:
        if "://" not in str(source) and not re.match(r"pipe:", str(source)):
            shards += as_shards(find_shards([source], what))
            continue
        scheme = str(source).split(":", 1)[0].lower()
        if scheme not in SCHEMES:
            raise UserError(
                f"{what}: {source} has the scheme {scheme!r}; shards are read from files and from {' and '.join(SCHEMES)} URLs: "
                "mount or copy the others"
            )
        cache = str(Path(data.cache_dir).expanduser() / "shards")
        shards += [RemoteShard(url, cache, int(data.shard_cache_gb * 1e9)) for url in _expand(str(source))]
    return shards


def _expand(url: str) -> list[str]:
    """URLs of a pattern with one range: a-{000..002}.tar -> a-000.tar, a-001.tar, a-002.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if not found:
        return [url]
    first, last = found.groups()
    head, tail = url[: found.start()], url[found.end() :]
    return [f"{head}{number:0{len(first)}d}{tail}" for number in range(int(first), int(last) + 1)]
