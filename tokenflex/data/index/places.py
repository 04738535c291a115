"""Where indexes lie: beside their shards, or in the cache; one per tokenizer, chat template and tiling.

The first index of some shards is `index`, each further one `index-<fingerprint>` beside it, so that several models train on
one set of shards, also at once. Shards that are no whole folder, or in one that cannot be written, have theirs in the cache.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import only_one_inside, write_whole
from ...layout import MANIFEST
from ..shards import Shard, ShardLike, as_shards
from .reader import read_manifest


def index_folder(shards: Sequence[ShardLike], cache_dir: str | PathLike, fingerprint: str) -> Path:
    """Where the index of these shards with this fingerprint lies, or would be built."""
    *beside, in_cache = _bases(as_shards(shards), cache_dir)
    for base in beside:
        folder = _own_folder(base, fingerprint)
        if (folder / MANIFEST).exists() or os.access(base.parent, os.W_OK):
            return folder
    return _own_folder(in_cache, fingerprint)


def _bases(shards: Sequence[Shard], cache_dir: str | PathLike) -> list[Path]:
    """Where a first index of these shards would lie: beside them where they are a whole folder, and in the cache."""
    name = hashlib.sha256("\n".join(shard.address for shard in shards).encode()).hexdigest()[:16]
    in_cache = Path(cache_dir).expanduser() / "indexes" / name
    folder = shards[0].folder
    return [folder / "index", in_cache] if folder is not None and _is_whole(folder, shards) else [in_cache]


def _is_whole(folder: Path, shards: Sequence[Shard]) -> bool:
    """Whether these are all the shards of a folder, and no others."""
    names = {path.name for path in folder.glob("*.tar")}
    return names == {shard.name for shard in shards} and all(shard.folder == folder for shard in shards)


def _own_folder(base: Path, fingerprint: str) -> Path:
    """`base` where its index has this fingerprint or nobody has it, else the folder beside it that is named after it."""
    own = base.with_name(f"{base.name}-{fingerprint}")
    manifest = read_manifest(base)
    if manifest is not None:
        return base if manifest["fingerprint"] == fingerprint else own
    is_taken = (own / MANIFEST).exists() or _claim_of(base) not in ("", fingerprint)
    return own if is_taken else base


@contextmanager
def sole_builder(shards: Sequence[ShardLike], cache_dir: str | PathLike, fingerprint: str) -> Iterator[Path]:
    """The folder of an index, in which no other process builds within this context: jobs that start together build it once.

    Jobs with other tokenizers do not wait: the first of them claims `index`, by its fingerprint among the parts.
    """
    folder = index_folder(shards, cache_dir, fingerprint)
    while True:
        with builder_lock(folder):
            now = index_folder(shards, cache_dir, fingerprint)
            if now == folder:
                if not (folder / MANIFEST).exists():
                    _claim(folder, fingerprint)
                yield folder
                return
        folder = now  # another job has taken it while we waited


def builder_lock(folder: str | PathLike) -> AbstractContextManager[None]:
    """No other process builds the index of this folder within this context."""
    return only_one_inside(Path(folder).with_name(Path(folder).name + ".lock"))


def _claim(folder: Path, fingerprint: str) -> None:
    """Say which index is being built here; goes with the parts when it is done."""
    parts = parts_folder(folder)
    parts.mkdir(parents=True, exist_ok=True)
    write_whole(parts / "fingerprint", fingerprint)


def _claim_of(base: Path) -> str:
    """The fingerprint that is being built at `base`; empty where none is."""
    claim = parts_folder(base) / "fingerprint"
    return claim.read_text() if claim.exists() else ""


@dataclass(frozen=True)
class Found:
    """An index of some shards: its folder, what its manifest says, and the bytes that it takes."""

    folder: Path
    manifest: dict[str, Any]
    num_bytes: int

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    def describe(self) -> str:
        """A line for a person."""
        entries = self.manifest["shards"]
        samples, skipped = (sum(entry["num_samples"] for entry in entries), sum(len(e["skipped"]) for e in entries))
        date = f", rendered as on {self.manifest['render_date']}" if "render_date" in self.manifest else ""
        return (
            f"{self.fingerprint}  {samples} samples of {len(entries)} shards ({skipped} bad ones left out){date}, "
            f"{self.num_bytes / 1e6:.1f} MB  {self.folder}"
        )


def find_indexes(shards: Sequence[ShardLike], cache_dir: str | PathLike) -> list[Found]:
    """All indexes of these shards: beside them, and in the cache."""
    found = []
    for base in _bases(as_shards(shards), cache_dir):
        for folder in [base, *sorted(base.parent.glob(f"{base.name}-*"))]:
            manifest = read_manifest(folder)
            if manifest is not None:
                found.append(Found(folder, manifest, sum(path.stat().st_size for path in folder.iterdir())))
    return found


def choose_indexes(found: Sequence[Found], fingerprints: Sequence[str]) -> list[Found]:
    """Those of the given fingerprints, which may be shortened.

    Raises:
        UserError: one that no index has, or several have.
    """
    chosen = []
    for wanted in fingerprints:
        fits = [index for index in found if index.fingerprint.startswith(wanted)]
        if len({index.fingerprint for index in fits}) != 1:
            known = ", ".join(index.fingerprint for index in found) or "none"
            raise UserError(
                f"data index: {len(fits)} indexes have the fingerprint {wanted}; wanted one of those there: {known}"
            )
        chosen += fits
    return chosen


def remove_index(folder: str | PathLike) -> None:
    """Remove an index and what is there of its parts: every shard will be read again."""
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(parts_folder(folder), ignore_errors=True)


def parts_folder(folder: str | PathLike) -> Path:
    """Where the part files of an index that is being built lie."""
    return Path(folder).with_name(Path(folder).name + ".parts")
