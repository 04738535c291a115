"""Shards behind http(s): fetched whole into a local cache, a shard at a time, and read from there like any other.

Samples are shuffled inside blocks of shards, so a shard that has been fetched is read many times before the next. Only
http and https are opened: no scheme here starts a program.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from ..config import DataConfig
from ..errors import UserError
from .shards import Shard, Stamp, as_shards, find_shards

SCHEMES = ("http", "https")
TIMEOUT_S = 60


@dataclass(frozen=True)
class RemoteShard:
    """A shard at a URL; `cache` is the folder that it is fetched into, of `cache_bytes` at most."""

    url: str
    cache: str
    cache_bytes: int

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
        return self

    def stamp(self) -> Stamp:
        """Size and entity tag as the server gives them.

        Raises:
            UserError: the server does not answer for it.
        """
        with _request(self.url, method="HEAD") as answer:
            return {"size": int(answer.headers.get("Content-Length", 0)), "etag": answer.headers.get("ETag", "")}

    def local_file(self) -> Path:
        """Path of the local copy, fetched where it is not there; several processes may ask at once.

        Raises:
            UserError: the server does not answer, or ends before the last byte.
        """
        folder = Path(self.cache).expanduser()
        path = folder / (hashlib.sha256(self.url.encode()).hexdigest()[:16] + "-" + file_name(self.url))
        if path.exists():
            os.utime(path)  # the cache drops what was used longest ago
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a node fetches, the others wait for it
            if not path.exists():
                self._download(path)
                _make_room(folder, self.cache_bytes, keep=path)
        return path

    def _download(self, path):
        with _request(self.url) as answer, tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            shutil.copyfileobj(answer, file, 2**20)
            size = file.tell()
        wanted = int(answer.headers.get("Content-Length", size))
        if size != wanted:
            os.unlink(file.name)
            raise UserError(f"{self.url}: ended after {size} of {wanted} bytes; try again, or look at the server")
        os.replace(file.name, path)


def file_name(url: str) -> str:
    """The last part of a URL's path."""
    return PurePosixPath(urlsplit(url).path).name


def _request(url, method="GET"):
    try:
        return urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: the server answers {error.code} {error.reason}; wanted a shard there") from None
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{url}: cannot be fetched ({reason}); is the address right and the server up?") from None


def _make_room(folder, limit, keep):
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


def _expand(url):
    """URLs of a pattern with one range: a-{000..002}.tar -> a-000.tar, a-001.tar, a-002.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if not found:
        return [url]
    first, last = found.groups()
    head, tail = url[: found.start()], url[found.end() :]
    return [f"{head}{number:0{len(first)}d}{tail}" for number in range(int(first), int(last) + 1)]
