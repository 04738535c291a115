"""Lengths as a table: what the planner reads, from an .npz file or made up, for plans without any shard."""

import zipfile
from dataclasses import dataclass, field
from os import PathLike

import numpy as np

from ..errors import UserError

CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class LengthTable:
    """Text tokens and tiles per sample, with the columns and methods of an index that the planner uses.

    text, tiles [S]; learned [S] learned tokens, by default the text's. shard_size: samples in a row that count as a shard.
    """

    text: np.ndarray
    tiles: np.ndarray
    name: str
    learned: np.ndarray | None = None
    shard_size: int = 8192
    _stats: dict = field(default_factory=dict)

    @property
    def text_tokens(self) -> np.ndarray:
        return self.text

    @property
    def num_tiles(self) -> np.ndarray:
        return self.tiles

    @property
    def learned_tokens(self) -> np.ndarray:
        return self.text if self.learned is None else self.learned

    @property
    def shard_sizes(self) -> np.ndarray:
        whole, rest = divmod(len(self.text), self.shard_size)
        return np.array([self.shard_size] * whole + [rest] * (rest > 0), np.int64)

    def shard_of(self, sample_id: int) -> str:
        """Where a sample comes from, for messages."""
        return self.name

    def num_answered(self) -> int:
        """How many samples have something to learn."""
        return self._statistics()[1]

    def longest_text(self) -> np.ndarray:
        """Text tokens of the longest sample with each number of tiles, -1 where there is none: [tiles + 1] int64."""
        return self._statistics()[0]

    def cut(
        self, sample_id: int, visual_tokens: int, max_tokens: int, max_tiles: int, num_views: int = 1
    ) -> tuple[int, int, int, int] | None:
        """A table does not say where conversations could end, so none is truncated."""
        return None

    def _statistics(self) -> tuple[np.ndarray, int]:
        """One pass over the table, a chunk at a time."""
        if not self._stats:
            longest, answered = np.full(1, -1, np.int64), 0
            for begin in range(0, len(self.text), CHUNK):
                text = self.text[begin : begin + CHUNK].astype(np.int64)
                tiles = self.tiles[begin : begin + CHUNK].astype(np.int64)
                if len(text) and (text.min() < 0 or tiles.min() < 0):
                    raise UserError(f"{self.name}: holds negative lengths; wanted text tokens and tiles per sample")
                more = int(tiles.max(initial=0)) + 1 - len(longest)
                longest = np.append(longest, np.full(max(more, 0), -1))
                np.maximum.at(longest, tiles, text)
                answered += int((self.learned_tokens[begin : begin + CHUNK] > 0).sum())
            self._stats.update(result=(longest, answered))
        return self._stats["result"]


def load_table(path: str | PathLike) -> LengthTable:
    """The `LengthTable` of an .npz file with the int arrays `text` and `tiles` [S]; mapped where it is not compressed.

    Raises:
        UserError: no such file, no .npz, arrays missing, of another type, or of different lengths.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            missing = sorted({"text", "tiles"} - names)
            if missing:
                raise UserError(
                    f"--lengths {path}: lacks {' and '.join(missing)}; wanted int arrays text and tiles, one entry per sample"
                )
            text, tiles = (_member(archive, path, name) for name in ("text", "tiles"))
    except OSError as error:
        raise UserError(f"--lengths {path}: {error.strerror}; wanted an .npz file with arrays text and tiles") from None
    except (zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"--lengths {path}: not a readable .npz file ({error})") from None
    for name, array in (("text", text), ("tiles", tiles)):
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or len(array) != len(text):
            raise UserError(
                f"--lengths {path}: {name} is {array.dtype} {list(array.shape)}; wanted one whole number per sample, as many of text as of tiles"
            )
    return LengthTable(text=text, tiles=tiles, name=str(path))


def _member(archive: zipfile.ZipFile, path: str | PathLike, name: str) -> np.ndarray:
    """One array of an .npz: memory-mapped if it is stored as it is, else read."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)  # the local header's own name and extra field come before the data
        skip = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
        file.seek(info.header_offset + 30 + skip)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds objects")
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")
