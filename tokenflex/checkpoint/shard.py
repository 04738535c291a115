"""One rank's file: slices of parameters and optimizer state in the safetensors format, written in one pass with its hash.

The library's own writer wants every tensor's bytes at once and tells no checksum; this one streams. Reading is the
library's. Names within a file: `weight/<parameter>@<start>`, `exp_avg/...`, `exp_avg_sq/...`, `buffer/<name>`, `random/<generator>`.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from .. import failpoints
from .disk import HashingFile
from .manifest import Damaged, FileEntry

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def shard_name(rank: int, num_ranks: int) -> str:
    """File name of a rank's part: what is trained, moments, generators and buffers."""
    return f"rank-{rank:05d}-of-{num_ranks:05d}.safetensors"


def frozen_name(rank: int, num_ranks: int) -> str:
    """File name of a rank's part of the frozen weights."""
    return f"frozen-{rank:05d}-of-{num_ranks:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], step: int) -> FileEntry:
    """Write {name: contiguous tensor} and sync it; returns {"size", "blake3"} of the file.

    Raises:
        OSError: the disk is full or fails; what was written stays, in a folder that no reader takes for a checkpoint.
    """
    text, header = _header(tensors)
    failpoints.hit("shard-0", step)
    half: int | None = max((entry["data_offsets"][1] for entry in header.values()), default=0) // 2
    with HashingFile(path) as file:
        file.write(text)
        for name, tensor in tensors.items():
            file.write(_bytes(tensor))
            if half is not None and header[name]["data_offsets"][1] >= half:
                failpoints.hit("shard-50", step)
                half = None
        failpoints.hit("shard-100", step)
    return {"size": file.num_bytes, "blake3": file.checksum}


def describe_shard(tensors: Mapping[str, torch.Tensor]) -> FileEntry:
    """What `write_shard` would return, without writing."""
    text, _ = _header(tensors)
    size, digest = len(text), blake3(text)
    for tensor in tensors.values():
        data = memoryview(_bytes(tensor)).cast("B")
        size += len(data)
        digest.update(data)
    return {"size": size, "blake3": digest.hexdigest()}


def _header(tensors):
    """(the file's beginning, {name: where and what it is}) of the safetensors format."""
    header: dict[str, dict[str, Any]] = {}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return struct.pack("<Q", len(text)) + text, header


class ShardReader:
    """The tensors of one file, read in pieces. Use as a context manager.

    Raises:
        Damaged: not a safetensors file (the library refuses oversized headers and offsets outside the file).
    """

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{path.name} cannot be read ({error})") from None
        self._names = list(self._file.keys())
        self.slices: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for name in self._names:
            kind, _, rest = name.partition("/")
            parameter, at, start = rest.rpartition("@")
            if at:
                self.slices.setdefault((kind, parameter), []).append((int(start), name))

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file = None

    def names(self, kind: str) -> list[str]:
        """Names of the whole tensors of a kind ("buffer", "random"), without the kind."""
        return [name.partition("/")[2] for name in self._names if name.startswith(kind + "/")]

    def tensor(self, kind: str, name: str) -> torch.Tensor:
        """A whole tensor."""
        return self._file.get_tensor(f"{kind}/{name}")

    def copy_into(self, target: torch.Tensor, kind: str, parameter: str, start: int) -> int:
        """Copy what this file holds of elements [start, start + len(target)) into `target` [n]; returns how many."""
        copied = 0
        for begin, name in self.slices.get((kind, parameter), ()):
            piece = self._file.get_slice(name)
            length = piece.get_shape()[0]
            first, last = max(begin, start), min(begin + length, start + target.numel())
            if first < last:
                values = piece[first - begin : last - begin]
                target[first - start : last - start].copy_(values)
                copied += last - first
        return copied


def slice_name(kind: str, parameter: str, start: int) -> str:
    """Name of a slice within a file."""
    return f"{kind}/{parameter}@{start}"


def _bytes(tensor: torch.Tensor) -> bytes | memoryview:
    return memoryview(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
