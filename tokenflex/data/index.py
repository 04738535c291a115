"""The sidecar index: per sample its lengths and its place, so that packs are planned without opening a shard.

An index is a folder of memory-mapped columns (`text_tokens.npy`, ...) and a `manifest.json` with the shards' names, sizes,
checksums and sample counts and a fingerprint of tokenizer, chat template and tiling: lengths counted by another tokenizer
are an error, not a surprise at step 10,000. The planner reads 12 bytes per sample, the loader 12 more.

Each shard is scanned into a part file of its own, so a build that was stopped goes on where it was, several processes
share the work without sending tables around, and added shards are the only ones that are read.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
import numpy as np

from ..errors import UserError
from .images import read_header
from .problems import BadSample, Limits
from .remote import RemoteShard, local_file
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
"""One number per sample."""
RAGGED = {
    "image_sizes": (np.uint32, 2),
    "cuts": (np.int64, 5),
}
"""Rows of which a sample has none or several: see `Index`."""
INDEX_COMMAND = "python launch/index.py --config RECIPE"


@dataclass(frozen=True, kw_only=True)
class Index:
    """The samples of a list of shards, in the shards' order.

    text_tokens [S]: tokens without visual ones (image markers counted). learned_tokens [S]: those the loss looks at.
    num_images, num_tiles [S]: images, and the tiles that they are cut into. offset, num_bytes [S]: place in the shard.
    image_sizes [images, 2]: height and width in pixels, 0 where the header cannot be read. cuts [answers, 5]: where
    conversations with several answers may end: sample, messages, text tokens, learned tokens, tiles up to there; sorted.
    shards: paths. entries: what the manifest says of each. first_sample [shards + 1]: ids per shard.
    """

    shards: list
    entries: list
    first_sample: np.ndarray
    text_tokens: np.ndarray
    learned_tokens: np.ndarray
    num_images: np.ndarray
    num_tiles: np.ndarray
    offset: np.ndarray
    num_bytes: np.ndarray
    image_sizes: np.ndarray
    cuts: np.ndarray
    fingerprint: str

    def __len__(self):
        return len(self.text_tokens)

    @property
    def shard_sizes(self):
        """Samples per shard: [shards] int64."""
        return np.diff(self.first_sample)

    def shard_of(self, sample_id):
        """Path of the shard that holds a sample."""
        return self.shards[int(np.searchsorted(self.first_sample, sample_id, side="right")) - 1]

    def place(self, sample_id):
        """(shard, offset, bytes) of a sample."""
        return self.shard_of(sample_id), int(self.offset[sample_id]), int(self.num_bytes[sample_id])

    def num_skipped(self):
        """How many bad samples the shards hold that the index leaves out."""
        return sum(len(entry["skipped"]) for entry in self.entries)

    def num_answered(self):
        """How many samples have something to learn."""
        return sum(entry["num_answered"] for entry in self.entries)

    def longest_text(self):
        """Text tokens of the longest sample with each number of tiles, -1 where there is none: [tiles + 1] int64."""
        longest = np.full(max([1, *(len(entry["longest_text"]) for entry in self.entries)]), -1)
        for entry in self.entries:
            longest[: len(entry["longest_text"])] = np.maximum(
                longest[: len(entry["longest_text"])], entry["longest_text"]
            )
        return longest

    def cut(self, sample_id, count, max_tokens, max_tiles):
        """The last answer after which a conversation fits a pack at `count` visual tokens per tile.

        Returns (messages, text tokens, learned tokens, tiles) up to there, or None where not even the first fits.
        """
        begin, end = np.searchsorted(self._cut_samples, [sample_id, sample_id + 1])
        rows = np.asarray(self.cuts[begin:end])
        fits = np.flatnonzero((rows[:, 2] + rows[:, 4] * count <= max_tokens) & (rows[:, 4] <= max_tiles))
        return tuple(int(value) for value in rows[fits[-1], 1:]) if len(fits) else None

    def text_of_cut(self, sample_id, num_messages):
        """(text tokens, tiles) of a conversation that ends after `num_messages`."""
        begin, end = np.searchsorted(self._cut_samples, [sample_id, sample_id + 1])
        row = next(row for row in np.asarray(self.cuts[begin:end]) if row[1] == num_messages)
        return int(row[2]), int(row[4])

    @cached_property
    def _cut_samples(self):
        return self.cuts[:, 0]


def tiling_of(processor):
    """What the number of tiles of an image depends on, as text."""
    names = ("max_tiles", "thumbnail", "height", "width")
    return " ".join(f"{name}={getattr(processor.image_processor, name)}" for name in names)


def fingerprint(processor):
    """What the lengths in an index depend on: `tokenizer-template-tiling`, eight hex digits each."""
    tokens = processor.image_start_token + processor.image_token + processor.image_end_token
    parts = (
        processor.tokenizer.backend_tokenizer.to_str() + "\0" + tokens,
        str(processor.chat_template),
        f"{tiling_of(processor)}\0{VERSION}",
    )
    return "-".join(hashlib.sha256(part.encode()).hexdigest()[:8] for part in parts)


def index_folder(shards, cache_dir):
    """Where the index of these shards lies: beside them if they are a whole folder that can be written, else in the cache."""
    if not any(isinstance(shard, RemoteShard) for shard in shards):
        folder = shards[0].parent
        is_whole = set(shards) == set(folder.glob("*.tar"))
        if is_whole and (os.access(folder, os.W_OK) or (folder / "index" / "manifest.json").exists()):
            return folder / "index"
    names = (str(shard) if isinstance(shard, RemoteShard) else str(shard.resolve()) for shard in shards)
    name = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    return Path(cache_dir).expanduser() / "indexes" / name


def load_or_build_index(shards, processor, folder, num_workers=1, limits=Limits()):  # noqa: B008  frozen
    """The index at `folder`, built first where it is missing, and with shards added that are new.

    Raises:
        UserError: a shard or sample that cannot be read, an index of another tokenizer, or of shards that have changed.
    """
    with sole_builder(folder):
        manifest = _read_manifest(folder)
        if manifest is not None:
            _check_fingerprint(folder, manifest, processor)
            known, _, changed = _compare(manifest, shards)
            for shard, before, now in changed:
                raise UserError(
                    f"index {folder}: {shard} has changed since: sha256 {before[:16]} was indexed, it is {now[:16]} now "
                    f"({len(changed)} such shards); restore it, or run: {INDEX_COMMAND}"
                )
        if manifest is None or not _says_all(manifest, shards, known):
            build_index(shards, processor, folder, num_workers, limits=limits)
        elif os.access(folder, os.W_OK):
            _stamp_again(Path(folder), manifest, shards)
        return load_index(folder, shards, processor)


@contextmanager
def sole_builder(folder):
    """No other process is inside for this index: jobs that start together on the same shards build it once.

    A file lock (`index.lock`), which ends with its process. Where none can be had (a read-only folder, a file system
    without locks), there is none.
    """
    path = Path(folder).with_name(Path(folder).name + ".lock")
    descriptor = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _stamp_again(folder, manifest, shards):
    """Remember the times of shards that were touched or copied, so that their bytes are not compared at every start."""
    entries = [{**entry, **_stamp(shard)} for entry, shard in zip(manifest["shards"], shards)]
    if entries != manifest["shards"]:
        temporary = folder / "manifest.json.tmp"
        temporary.write_text(json.dumps({**manifest, "shards": entries}, indent=1))
        os.replace(temporary, folder / "manifest.json")


def load_index(folder, shards, processor):
    """Open an index, memory-mapped.

    Raises:
        UserError: its fingerprint is not this processor's; the message has both and the way to mend it.
    """
    _check_fingerprint(folder, _read_manifest(folder), processor)
    return open_index(folder, shards)


def open_index(folder, shards=None):
    """Open an index without its tokenizer, memory-mapped; `shards` are paths, by default the names in the index.

    Raises:
        UserError: no index there.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: no index there (no manifest.json); build one with: {INDEX_COMMAND}")
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in (*COLUMNS, *RAGGED)}
    first_sample = np.cumsum([0, *(entry["num_samples"] for entry in manifest["shards"])])
    return Index(
        shards=list(shards or [Path(entry["name"]) for entry in manifest["shards"]]),
        entries=manifest["shards"],
        first_sample=first_sample,
        fingerprint=manifest["fingerprint"],
        **columns,
    )


def _read_manifest(folder):
    path = Path(folder) / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else None


def _check_fingerprint(folder, manifest, processor):
    wanted = fingerprint(processor)
    if manifest["fingerprint"] != wanted:
        raise UserError(
            f"index {folder}: made with tokenizer, template and tiling {manifest['fingerprint']}, this run has {wanted}; "
            f"remove the folder or run: {INDEX_COMMAND} --rebuild, with this run's recipe"
        )


def build_index(shards, processor, folder, num_workers=1, map_shards=None, limits=Limits()):  # noqa: B008  frozen
    """Scan the shards that the index at `folder` does not know and write the whole index in one rename.

    `map_shards(function, shards)` runs the function on each shard and yields the results in order; by default over
    `num_workers` processes (the MPI entry point brings its own). An index of another fingerprint is built from nothing.

    Raises:
        UserError: a shard or sample that cannot be read.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scanner = ShardScanner(processor, parts_folder(folder), limits)
    wanted = shards_to_scan(shards, processor, folder)
    if map_shards is None:
        map_shards = lambda function, items: _map_processes(function, items, num_workers)  # noqa: E731
    parts = dict(zip(wanted, map_shards(scanner, wanted)))
    assemble_index(shards, processor, folder, parts)


def parts_folder(folder):
    """Where the part files of an index that is being built lie."""
    return Path(folder).with_name(Path(folder).name + ".parts")


def shards_to_scan(shards, processor, folder):
    """The shards whose rows the index at `folder` does not have: new ones and changed ones, each once."""
    manifest = _read_manifest(folder)
    if manifest is None or manifest["fingerprint"] != fingerprint(processor):
        return list(dict.fromkeys(shards))
    known, new, changed = _compare(manifest, shards)
    return list(dict.fromkeys([*new, *(shard for shard, _, _ in changed)]))


def assemble_index(shards, processor, folder, parts):
    """Write the index at `folder` of part files {shard: path} and, for the other shards, of the rows that it has."""
    folder = Path(folder)
    old = _read_manifest(folder)
    old_rows = {}
    if old is not None and old["fingerprint"] == fingerprint(processor):
        before = open_index(folder)
        by_shard = _compare(old, shards)[0]
        old_rows = {shard: (before, number) for shard, number in by_shard.items()}
    tables = [_part_rows(parts[shard]) if shard in parts else _old_rows(*old_rows[shard]) for shard in shards]
    temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    first = np.cumsum([0, *(entry["num_samples"] for entry, _ in tables)])
    for name in (*COLUMNS, *RAGGED):
        dtype, width = RAGGED.get(name, (COLUMNS.get(name), None))
        total = sum(len(rows[name]) for _, rows in tables)
        shape = (total,) if width is None else (total, width)
        _write_column(temporary / f"{name}.npy", dtype, shape, tables, name, first)
    entries = [{**entry, **_stamp(shard), "name": _name(shard)} for shard, (entry, _) in zip(shards, tables)]
    manifest = {"version": VERSION, "fingerprint": fingerprint(processor), "shards": entries}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.chmod(0o755)  # mkdtemp's folder is for its owner alone; others may train on the shards
    temporary.rename(folder)
    shutil.rmtree(parts_folder(folder), ignore_errors=True)


def _write_column(path, dtype, shape, tables, name, first):
    """One column of all shards, written through so that memory does not grow with the corpus."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        )
        for number, (_, rows) in enumerate(tables):
            values = np.asarray(rows[name], dtype)
            if name == "cuts" and len(values):
                values = values + np.array([first[number], 0, 0, 0, 0])
            file.write(np.ascontiguousarray(values).tobytes())


def _part_rows(path):
    """(entry, rows) of a part file; the rows are read when they are asked for."""
    part = np.load(path, allow_pickle=False)
    return json.loads(str(part["entry"])), part


def _old_rows(before, number):
    low, high = int(before.first_sample[number]), int(before.first_sample[number + 1])
    rows = {name: getattr(before, name)[low:high] for name in COLUMNS}
    first_image = int(before.num_images[:low].sum(dtype=np.int64))
    rows["image_sizes"] = before.image_sizes[first_image : first_image + int(rows["num_images"].sum(dtype=np.int64))]
    begin, end = np.searchsorted(before.cuts[:, 0], [low, high])
    rows["cuts"] = before.cuts[begin:end] - np.array([low, 0, 0, 0, 0])
    return before.entries[number], rows


class ShardScanner:
    """`scanner(shard)` -> path of the shard's part file, scanned where it is not there; carries the processor along.

    Bad samples are left out and listed in the shard's entry of the manifest. Images are judged by their headers here; one
    whose data is broken is found when it is decoded.
    """

    def __init__(self, processor, folder, limits=Limits()):  # noqa: B008  frozen
        self.processor = processor
        self.folder = Path(folder)
        self.limits = limits

    def __call__(self, shard):
        stamp = _stamp(shard)
        key = f"{shard}\0{stamp}\0{fingerprint(self.processor)}\0{self.limits}"
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
        if path.exists():
            return path
        rows, sizes, cuts, skipped = [], [], [], []
        file = local_file(shard)
        for scanned in scan_shard(file, self.limits):
            try:
                if scanned.problem is not None:
                    raise scanned.problem
                row, sample_sizes, sample_cuts = self.scan(scanned.sample, len(rows))
            except BadSample as problem:
                skipped.append(problem.located(shard, scanned.key, scanned.offset).record())
                continue
            rows.append((*row, scanned.offset, scanned.num_bytes))
            sizes += sample_sizes
            cuts += sample_cuts
        table = np.array(rows, dtype=np.uint64).reshape(-1, len(COLUMNS))
        columns = {name: table[:, i].astype(dtype) for i, (name, dtype) in enumerate(COLUMNS.items())}
        entry = {
            "num_samples": len(rows),
            "num_answered": int((columns["learned_tokens"] > 0).sum()),
            "longest_text": _longest_text(columns["text_tokens"], columns["num_tiles"]),
            "sha256": file_sha256(file),
            "skipped": skipped,
        }
        for name, values in (("image_sizes", sizes), ("cuts", cuts)):
            dtype, width = RAGGED[name]
            columns[name] = np.array(values, dtype).reshape(-1, width)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as part:
            np.savez(part, entry=json.dumps(entry), **columns)
        os.replace(part.name, path)
        return path

    def scan(self, sample, number):
        """((text, learned, images, tiles), image sizes, cuts) of a parsed sample, `number` its place in the shard.

        Raises:
            BadSample: an image that is refused by its header, or turns that the chat template refuses.
        """
        sizes = [(header.height, header.width) for header in (read_header(data, self.limits) for data in sample.images)]
        heights, widths = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
        tiles = self.processor.image_processor.num_tiles(widths, heights).tolist()
        encoded = self._encode(sample.messages, len(sample.images))
        row = (len(encoded.input_ids), sum(encoded.is_target), len(sample.images), sum(tiles))
        cuts = []
        answers = [at + 1 for at, message in enumerate(sample.messages) if message["role"] == "assistant"]
        for num_messages in answers[:-1]:  # where it may end before its end
            head = sample.messages[:num_messages]
            images = sum(item["type"] == "image" for message in head for item in message["content"])
            encoded = self._encode(head, images)
            if sum(encoded.is_target):
                cuts.append((number, num_messages, len(encoded.input_ids), sum(encoded.is_target), sum(tiles[:images])))
        return row, sizes, cuts

    def _encode(self, messages, num_images):
        try:
            return self.processor.encode(messages, [0] * num_images)
        except jinja2.TemplateError as error:
            raise BadSample("message", f"the chat template refuses its turns ({error})") from None


def _longest_text(text_tokens, num_tiles):
    longest = np.full(int(num_tiles.max(initial=0)) + 1, -1, np.int64)
    np.maximum.at(longest, num_tiles.astype(np.int64), text_tokens.astype(np.int64))
    return longest.tolist()


def file_sha256(path):
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _map_processes(function, items, num_workers):
    if num_workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(min(num_workers, len(items))) as pool:
        yield from pool.map(function, items)


def _name(shard):
    return str(shard) if isinstance(shard, RemoteShard) else shard.name


def _stamp(shard):
    """What tells without reading a shard that it is the same."""
    if isinstance(shard, RemoteShard):
        return shard.stamp()
    status = shard.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _compare(manifest, shards):
    """({shard: number in the manifest}, new shards, [(changed shard, its sha256 before, now)])."""
    by_stamp, by_name = {}, {}
    for number, entry in enumerate(manifest["shards"]):
        by_stamp[_stamp_key(entry)] = number
        by_name.setdefault(entry["name"], number)
    known, new, changed = {}, [], []
    for shard in dict.fromkeys(shards):
        number = by_stamp.get(_stamp_key({"name": _name(shard), **_stamp(shard)}))
        if number is None and _name(shard) in by_name:  # perhaps only touched or copied: its bytes decide
            before, now = manifest["shards"][by_name[_name(shard)]]["sha256"], file_sha256(local_file(shard))
            if now != before:
                changed.append((shard, before, now))
                continue
            number = by_name[_name(shard)]
        if number is None:
            new.append(shard)
        else:
            known[shard] = number
    return known, new, changed


def _stamp_key(entry):
    return tuple(
        sorted((key, str(value)) for key, value in entry.items() if key in ("name", "size", "mtime_ns", "etag"))
    )


def _says_all(manifest, shards, known):
    """Whether the index has these shards, in this order, and no others."""
    return [known.get(shard) for shard in shards] == list(range(len(manifest["shards"])))
