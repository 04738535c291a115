"""The sidecar index: per sample its lengths and its place, so that packs are planned without opening a shard.

An index is a folder of memory-mapped columns (`text_tokens.npy`, ...) and a `manifest.json` with the shards' names, sizes
and sample counts and a fingerprint of tokenizer and chat template: lengths counted by another tokenizer are an error, not
a surprise at step 10,000.
"""

import hashlib
import json
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from ..errors import UserError
from .images import read_header
from .problems import BadSample, Limits
from .scan import scan_shard

VERSION = 2
COLUMNS = {
    "text_tokens": np.uint32,
    "learned_tokens": np.uint32,
    "num_images": np.uint16,
    "num_tiles": np.uint16,
    "offset": np.uint64,
    "num_bytes": np.uint32,
}


@dataclass(frozen=True, kw_only=True)
class Index:
    """The samples of a list of shards, in the shards' order.

    text_tokens [S]: tokens without visual ones (image markers counted). learned_tokens [S]: those the loss looks at.
    num_images, num_tiles [S]. offset, num_bytes [S]: place in the shard. num_skipped: bad samples left out. shards: paths. first_sample [shards + 1]: ids per shard.
    """

    shards: list
    first_sample: np.ndarray
    text_tokens: np.ndarray
    learned_tokens: np.ndarray
    num_images: np.ndarray
    num_tiles: np.ndarray
    offset: np.ndarray
    num_bytes: np.ndarray
    fingerprint: str
    num_skipped: int = 0

    def __len__(self):
        return len(self.text_tokens)

    def shard_of(self, sample_id):
        """Path of the shard that holds a sample."""
        return self.shards[int(np.searchsorted(self.first_sample, sample_id, side="right")) - 1]


def fingerprint(processor):
    """What the lengths in an index depend on: tokenizer, chat template, image tokens, format version, tiling."""
    parts = (
        processor.tokenizer.backend_tokenizer.to_str(),
        str(processor.chat_template),
        processor.image_start_token + processor.image_token + processor.image_end_token,
        str(VERSION),
        str([getattr(processor.image_processor, name) for name in ("max_tiles", "thumbnail", "height", "width")]),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def index_folder(shards, cache_dir):
    """Where the index of these shards lies: beside them if they share a writable folder, else in the cache."""
    folders = {shard.parent for shard in shards}
    if len(folders) == 1 and os.access(shards[0].parent, os.W_OK):
        return shards[0].parent / "index"
    name = hashlib.sha256("\n".join(str(shard.resolve()) for shard in shards).encode()).hexdigest()[:16]
    return Path(cache_dir).expanduser() / "indexes" / name


def load_or_build_index(shards, processor, folder, num_workers=1, limits=Limits()):  # noqa: B008  frozen
    """The index at `folder`, built first where it is missing or older than a shard.

    Raises:
        UserError: a shard or sample that cannot be read, or an index of another tokenizer.
    """
    if not _is_current(folder, shards):
        build_index(shards, processor, folder, num_workers, limits=limits)
    return load_index(folder, shards, processor)


def load_index(folder, shards, processor):
    """Open an index, memory-mapped.

    Raises:
        UserError: its fingerprint is not this processor's; the message has both and the way to mend it.
    """
    folder = Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    wanted = fingerprint(processor)
    if manifest["fingerprint"] != wanted:
        raise UserError(
            f"index {folder}: made with tokenizer and template {manifest['fingerprint']}, this run has {wanted}; "
            f"remove the folder or run: python launch/index.py --rebuild with this run's config"
        )
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
    first_sample = np.cumsum([0, *(entry["num_samples"] for entry in manifest["shards"])])
    num_skipped = sum(len(entry["skipped"]) for entry in manifest["shards"])
    return Index(shards=list(shards), first_sample=first_sample, fingerprint=wanted, num_skipped=num_skipped, **columns)


def build_index(shards, processor, folder, num_workers=1, map_shards=None, limits=Limits()):  # noqa: B008  frozen
    """Read every shard once and write the index at `folder` in one rename.

    `map_shards(function, shards)` runs the function on each shard and yields the results in order; by default over
    `num_workers` processes (the MPI entry point brings its own).
    """
    if map_shards is None:
        map_shards = lambda function, items: _map_processes(function, items, num_workers)  # noqa: E731
    entries, columns = [], {name: [] for name in COLUMNS}
    for shard, arrays in zip(shards, map_shards(ShardScanner(processor, limits), shards)):
        skipped = [problem.record() for problem in arrays["skipped"]]
        entries.append({"name": shard.name, **_stamp(shard), "num_samples": len(arrays["offset"]), "skipped": skipped})
        for name in COLUMNS:
            columns[name].append(arrays[name])
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    for name, dtype in COLUMNS.items():
        np.save(temporary / f"{name}.npy", np.concatenate([np.empty(0, dtype), *columns[name]]))
    manifest = {"version": VERSION, "fingerprint": fingerprint(processor), "shards": entries}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


class ShardScanner:
    """`scanner(shard)` -> the columns of one shard, and `skipped`: the `BadSample`s that are left out of it.

    Images are judged by their headers here; one whose data is broken is found when it is decoded. Carries the processor
    to other processes.
    """

    def __init__(self, processor, limits=Limits()):  # noqa: B008  frozen
        self.processor = processor
        self.limits = limits

    def __call__(self, shard):
        rows, skipped = [], []
        for scanned in scan_shard(shard, self.limits):
            try:
                if scanned.problem is not None:
                    raise scanned.problem
                rows.append((*self.lengths(scanned.sample), scanned.offset, scanned.num_bytes))
            except BadSample as problem:
                skipped.append(problem.located(shard, scanned.key, scanned.offset))
        table = np.array(rows, dtype=np.uint64).reshape(-1, len(COLUMNS))
        columns = {name: table[:, i].astype(dtype) for i, (name, dtype) in enumerate(COLUMNS.items())}
        return {**columns, "skipped": skipped}

    def lengths(self, sample):
        """(text tokens, learned tokens, images, tiles) of a parsed sample.

        Raises:
            BadSample: an image that is refused by its header, or turns that the chat template refuses.
        """
        sizes = [(header.width, header.height) for header in (read_header(data, self.limits) for data in sample.images)]
        widths, heights = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
        num_tiles = int(self.processor.image_processor.num_tiles(widths, heights).sum())
        try:
            encoded = self.processor.encode(sample.messages, [0] * len(sample.images))
        except jinja2.TemplateError as error:
            raise BadSample("message", f"the chat template refuses its turns ({error})") from None
        return len(encoded.input_ids), sum(encoded.is_target), len(sample.images), num_tiles


def _map_processes(function, items, num_workers):
    if num_workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(min(num_workers, len(items))) as pool:
        yield from pool.map(function, items)


def _stamp(shard):
    status = shard.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_current(folder, shards):
    manifest = Path(folder) / "manifest.json"
    if not manifest.exists():
        return False
    entries = json.loads(manifest.read_text())["shards"]
    stamps = [{key: entry[key] for key in ("name", "size", "mtime_ns")} for entry in entries]
    return stamps == [{"name": shard.name, **_stamp(shard)} for shard in shards]
