"""An index made: shards are scanned, each into a part file of its own, and the parts are put together in one rename.

So a build that was stopped goes on where it was, several processes share the work without sending tables around, and added
shards are the only ones that are read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import UserError
from ...files import over_processes, staged_folder, write_whole
from ...layout import MANIFEST
from ..clips import with_frames
from ..images import read_header
from ..problems import BadSample, Limits
from ..processor import Processor
from ..sample import Sample, encoded
from ..shards import Shard, ShardLike, as_shards
from .freshness import VERSION, Freshness, compare, file_sha256, fingerprint, tells_date
from .places import builder_lock, parts_folder
from .reader import COLUMNS, INDEX_COMMAND, RAGGED, Index, check_fingerprint, load_index, open_index, read_manifest


def load_or_build_index(
    shards: Sequence[ShardLike], processor: Processor, folder: str | PathLike, limits: Limits, num_workers: int = 1
) -> Index:
    """The index at `folder`, built first where it is missing, and with shards added that are new.

    Raises:
        UserError: a shard or sample that cannot be read, an index of another tokenizer, or of shards that have changed.
    """
    with builder_lock(folder):
        complete_index(shards, processor, folder, limits, num_workers)
        return load_index(folder, shards, processor)


def complete_index(
    shards: Sequence[ShardLike], processor: Processor, folder: str | PathLike, limits: Limits, num_workers: int = 1
) -> None:
    """Build the index at `folder` where it is missing, add shards that are new; for who holds the builder's lock.

    Raises:
        UserError: see `load_or_build_index`.
    """
    shards, folder = as_shards(shards), Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return build_index(shards, processor, folder, limits, num_workers)
    check_fingerprint(folder, manifest, processor)
    found = compare(manifest["shards"], shards)
    if found.changed:
        first = found.changed[0]
        raise UserError(
            f"index {folder}: {first.shard} has changed since: sha256 {first.before[:16]} was indexed, it is {first.now[:16]} "
            f"now ({len(found.changed)} such shards); restore it, or run: {INDEX_COMMAND}"
        )
    if not found.is_whole(manifest["shards"], shards):
        return build_index(shards, processor, folder, limits, num_workers)
    if os.access(folder, os.W_OK):
        _stamp_again(folder, manifest, [found.stamps[shard] for shard in shards])
    return None


def _stamp_again(folder: Path, manifest: dict[str, Any], stamps: list) -> None:
    """Remember the times of shards that were touched or copied, so that their bytes are not compared at every start."""
    entries = [{**entry, **stamp} for entry, stamp in zip(manifest["shards"], stamps)]
    if entries != manifest["shards"]:
        write_whole(folder / MANIFEST, json.dumps({**manifest, "shards": entries}, indent=1))


def build_index(
    shards: Sequence[ShardLike], processor: Processor, folder: str | PathLike, limits: Limits, num_workers: int = 1
) -> None:
    """Scan the shards that the index at `folder` does not know and write the whole index in one rename.

    An index of another fingerprint is built from nothing.

    Raises:
        UserError: a shard or sample that cannot be read.
    """
    folder = Path(folder)
    scanner = ShardScanner(processor, parts_folder(folder), limits)
    parts = dict(over_processes(scanner, shards_to_scan(shards, processor, folder), num_workers))
    assemble_index(shards, processor, folder, parts)


def shards_to_scan(shards: Sequence[ShardLike], processor: Processor, folder: str | PathLike) -> list[Shard]:
    """The shards whose records the index at `folder` does not have: new ones and changed ones, each once."""
    return _known(as_shards(shards), processor, folder).to_scan()


def _known(shards: Sequence[Shard], processor: Processor, folder: str | PathLike) -> Freshness:
    """What of the index at `folder` can be taken over; nothing of one with another fingerprint."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["fingerprint"] != fingerprint(processor):
        return Freshness(new=list(dict.fromkeys(shards)))
    return compare(manifest["shards"], shards)


class _Table(NamedTuple):
    """What an index has of one shard: its entry of the manifest, and its records by column."""

    entry: dict[str, Any]
    columns: Mapping[str, np.ndarray]


def assemble_index(
    shards: Sequence[ShardLike], processor: Processor, folder: str | PathLike, parts: Mapping[Shard, Path]
) -> None:
    """Write the index at `folder` of part files {shard: path} and, for the other shards, of the records that it has."""
    shards, folder = as_shards(shards), Path(folder)
    found = _known([shard for shard in shards if shard not in parts], processor, folder)
    before = open_index(folder) if found.known else None
    tables = []
    for shard in shards:
        if shard in parts:
            tables.append(_scanned(parts[shard]))
        else:
            assert before is not None, f"{shard} has neither been scanned nor is it in the index"
            tables.append(_taken_over(before, found.known[shard], found.stamps[shard]))
    with staged_folder(folder) as staging:
        first_sample = np.cumsum([0, *(table.entry["num_samples"] for table in tables)])
        for name in (*COLUMNS, *RAGGED):
            _write_column(staging / f"{name}.npy", name, tables, first_sample)
        entries = [{**table.entry, "name": shard.name} for shard, table in zip(shards, tables)]
        manifest: dict[str, Any] = {"version": VERSION, "fingerprint": fingerprint(processor), "shards": entries}
        if tells_date(processor):
            manifest["render_date"] = processor.render_date
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(parts_folder(folder), ignore_errors=True)


def _write_column(path: Path, name: str, tables: list[_Table], first_sample: np.ndarray) -> None:
    """One column of all shards, written through so that memory does not grow with the corpus."""
    dtype, width = RAGGED[name] if name in RAGGED else (COLUMNS[name], 0)
    total = sum(len(table.columns[name]) for table in tables)
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": (total, width) if width else (total,),
    }
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for number, table in enumerate(tables):
            values = np.asarray(table.columns[name], dtype)
            if name == "cuts" and len(values):
                values = values + np.array([first_sample[number], 0, 0, 0, 0])
            file.write(np.ascontiguousarray(values).tobytes())


def _scanned(path: Path) -> _Table:
    """The table in a part file; its columns are read when they are asked for."""
    part = np.load(path, allow_pickle=False)
    return _Table(json.loads(str(part["entry"])), part)


def _taken_over(before: Index, number: int, stamp: dict) -> _Table:
    """The table of an index's shard, under the stamp that the shard has now."""
    low, high = int(before.first_sample[number]), int(before.first_sample[number + 1])
    columns = {name: getattr(before, name)[low:high] for name in COLUMNS}
    first_image = int(before.num_images[:low].sum(dtype=np.int64))
    num_images = int(columns["num_images"].sum(dtype=np.int64))
    columns["image_sizes"] = before.image_sizes[first_image : first_image + num_images]
    begin, end = np.searchsorted(before.cuts[:, 0], [low, high])
    columns["cuts"] = before.cuts[begin:end] - np.array([low, 0, 0, 0, 0])
    return _Table({**before.entries[number], **stamp}, columns)


class ShardScanner:
    """`scanner(shard)` -> path of the shard's part file, scanned where it is not there; carries the processor along.

    Bad samples are left out and listed in the shard's entry of the manifest. Images are judged by their headers here; one
    whose data is broken is found when it is decoded.
    """

    def __init__(self, processor: Processor, folder: str | PathLike, limits: Limits):
        self.processor = processor
        self.folder = Path(folder)
        self.limits = limits
        self.fingerprint = fingerprint(processor)

    def __call__(self, shard: Shard) -> Path:
        stamp = shard.stamp()  # before a byte of it is read: what changes it later is noticed
        key = f"{shard}\0{stamp}\0{self.fingerprint}\0{self.limits}"
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
        if path.exists():
            return path
        shard = shard.at(stamp)
        columns, skipped = self._columns(shard)
        entry: dict[str, Any] = {
            "num_samples": len(columns["text_tokens"]),
            "num_answered": int((columns["learned_tokens"] > 0).sum()),
            "longest_text": _longest_text(columns["text_tokens"], columns["num_tiles"]),
            "sha256": file_sha256(shard.local_file()),
            "skipped": skipped,
            **stamp,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        arrays: dict[str, Any] = {**columns, "entry": np.array(json.dumps(entry))}
        np.savez(temporary, **arrays)
        os.replace(temporary, path)
        return path

    def _columns(self, shard: Shard) -> tuple[dict[str, np.ndarray], list[dict]]:
        """(the columns of an index for a shard, a record of each bad sample)."""
        records: list[tuple] = []
        sizes: list[tuple] = []
        cuts: list[tuple] = []
        skipped = []
        for scanned in shard.scan(self.limits):
            try:
                sample = with_frames(scanned.whole, self.processor.frames)
                lengths, sample_sizes, sample_cuts = self.scan(sample, len(records))
            except BadSample as problem:
                skipped.append(problem.located(shard, scanned.key, scanned.offset).record())
                continue
            records.append((*lengths, scanned.offset, scanned.num_bytes))
            sizes += sample_sizes
            cuts += sample_cuts
        table = np.array(records, dtype=np.uint64).reshape(-1, len(COLUMNS))
        columns = {name: table[:, i].astype(dtype) for i, (name, dtype) in enumerate(COLUMNS.items())}
        for name, values in (("image_sizes", sizes), ("cuts", cuts)):
            dtype, width = RAGGED[name]
            columns[name] = np.array(values, dtype).reshape(-1, width)
        return columns, skipped

    def scan(self, sample: Sample, number: int) -> tuple[tuple[int, int, int, int], list[tuple], list[tuple]]:
        """((text, learned, images, tiles), image sizes, cuts) of a parsed sample, `number` its place in the shard.

        Raises:
            BadSample: an image that is refused by its header, or turns that the chat template refuses.
        """
        sizes = [(header.height, header.width) for header in (read_header(data, self.limits) for data in sample.images)]
        heights, widths = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
        tiles = self.processor.image_processor.num_tiles(widths, heights).tolist()
        tokens = encoded(self.processor, sample.messages, [0] * len(sample.images))
        lengths = (len(tokens.input_ids), sum(tokens.is_target), len(sample.images), sum(tiles))
        cuts = []
        answers = [at + 1 for at, message in enumerate(sample.messages) if message["role"] == "assistant"]
        for num_messages in answers[:-1]:  # where it may end before its end
            head = sample.messages[:num_messages]
            images = sum(item["type"] == "image" for message in head for item in message["content"])
            try:
                tokens = encoded(self.processor, head, [0] * images)
            except BadSample:  # the template writes the whole, but not so much of it
                continue
            if sum(tokens.is_target):
                cuts.append((number, num_messages, len(tokens.input_ids), sum(tokens.is_target), sum(tiles[:images])))
        return lengths, sizes, cuts


def _longest_text(text_tokens: np.ndarray, num_tiles: np.ndarray) -> list[int]:
    longest = np.full(int(num_tiles.max(initial=0)) + 1, -1, np.int64)
    np.maximum.at(longest, num_tiles.astype(np.int64), text_tokens.astype(np.int64))
    return longest.tolist()
