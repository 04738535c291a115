"""Which patches make up each pooled token, and with which weight.

Pooling a grid [H, W] to [n_h, n_w] is linear and separable: P = A_h X A_w'. One axis is one small matrix A [n, size]
whose rows sum to 1 and whose nonzeros lie side by side, so a row is a *window*: first index, count, weights. The
backward pass multiplies by A', whose rows are windows as well: a gather, with no atomics. Reference and kernels both
read the windows from here; everything is computed on the host in exact or double arithmetic and cached by shape.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("adaptive", "resize")
CACHED_BATCHES = 256  # batch geometries kept per process; one of 64 images at 27 x 27 -> 16 x 16 is 1.6 MB
MAX_ROWS = 2**31 - 1  # row numbers are int32 in the window tables; addresses are int64


class Windows(NamedTuple):
    """One axis: window i covers ``first[i] ... first[i] + count[i] - 1`` with ``weight[i, :count[i]]``."""

    first: Tensor  # int32 [n]
    count: Tensor  # int32 [n]
    weight: Tensor  # float32 [n, widest], 0 beyond count


class RowWindows(NamedTuple):
    """The windows of every output row of a ragged batch, ready for one launch.

    ``table`` is int32 [6, R], one column per output row: number of the first source row, source rows between two
    window lines, lines, cells per line, offset into ``weight`` of the lines' weights, and of the cells' weights.
    """

    table: Tensor
    weight: Tensor  # float32 [any]
    num_rows: int
    widest: int  # cells per line, at most


@functools.lru_cache(maxsize=4096)
@torch.inference_mode(False)  # the cached tensor also serves later calls that train
def axis_matrix(size: int, side: int, mode: str) -> Tensor:
    """The pooling matrix of one axis, float64 [side, size]; its rows sum to 1.

    ``adaptive`` averages ``floor(i * size / side) ... ceil((i + 1) * size / side) - 1`` (the paper). ``resize`` is the
    released projector: bilinear interpolation with aligned corners to the next multiple of ``side``, then an average.
    """
    matrix = torch.zeros(side, size, dtype=torch.float64, device="cpu")
    if mode == "adaptive":
        for i in range(side):
            start, stop = i * size // side, -((-(i + 1) * size) // side)
            matrix[i, start:stop] = 1.0 / (stop - start)
        return matrix
    resized = -(-size // side) * side
    per_token = resized // side
    for row in range(resized):
        # Exact integers: row * (size - 1) / (resized - 1) = left + rest / (resized - 1).
        left, rest = divmod(row * (size - 1), max(resized - 1, 1))
        share = rest / max(resized - 1, 1)
        matrix[row // per_token, left] += (1.0 - share) / per_token
        if rest:
            matrix[row // per_token, left + 1] += share / per_token
    return matrix


@functools.lru_cache(maxsize=4096)
def axis_windows(size: int, side: int, mode: str, transposed: bool = False) -> Windows:
    """The windows of ``axis_matrix``, or of its transpose (for the backward pass)."""
    matrix = axis_matrix(size, side, mode)
    rows = (matrix.T if transposed else matrix).contiguous()
    used = rows != 0
    columns = torch.arange(rows.shape[1])
    first = torch.where(used, columns, rows.shape[1]).amin(1)
    count = torch.where(used, columns + 1, 0).amax(1) - first
    span = torch.arange(int(count.max()))
    index = (first[:, None] + span).clamp(max=rows.shape[1] - 1)
    weight = torch.where(span < count[:, None], rows.gather(1, index), 0.0)
    return Windows(first.int(), count.int(), weight.float())


def check_geometry(grids: Sequence[int], sides: Sequence[int], mode: str) -> None:
    """Raise ``ValueError`` unless the flat lists (H, W, H, W, ...) and (n_h, n_w, ...) describe a batch."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {MODES}")
    if len(grids) != len(sides):
        raise ValueError(f"{len(grids) // 2} grids but {len(sides) // 2} sides: give one (n_h, n_w) per image")
    for name, values in (("grids", grids), ("sides", sides)):
        for index, value in enumerate(values):
            if value < 1:
                pair = tuple(values[index - index % 2 : index - index % 2 + 2])
                raise ValueError(f"{name}[{index // 2}] is {pair}: both numbers must be at least 1")


def num_patches(grids: Sequence[int]) -> int:
    """Rows that images of these flat grids (H, W, H, W, ...) occupy."""
    return sum(h * w for h, w in zip(grids[::2], grids[1::2], strict=True))


def check_rows(num_rows: int, grids: Sequence[int], what: str) -> None:
    """Raise ``ValueError`` unless ``num_rows`` rows are what the flat grids hold."""
    wanted = num_patches(grids)
    if num_rows != wanted:
        raise ValueError(
            f"{what} has {num_rows} rows, but the {len(grids) // 2} {'sides' if 'grad' in what else 'grids'} hold {wanted}: "
            "lay the images' rows one after another, row-major, with nothing between them"
        )


@functools.lru_cache(maxsize=1024)
def _image_table(
    grid: tuple[int, int], side: tuple[int, int], mode: str, transposed: bool
) -> tuple[Tensor, Tensor, int]:
    """``table`` [6, rows] of one image whose source rows start at 0, its weights, and its widest line."""
    lines = axis_windows(grid[0], side[0], mode, transposed)
    cells = axis_windows(grid[1], side[1], mode, transposed)
    pitch = side[1] if transposed else grid[1]  # source rows per line
    n_h, n_w = len(lines.first), len(cells.first)
    weight = torch.cat((lines.weight.flatten(), cells.weight.flatten()))
    by_line = lambda values: values[:, None].expand(n_h, n_w)  # noqa: E731
    by_cell = lambda values: values[None, :].expand(n_h, n_w)  # noqa: E731
    table = torch.stack(
        (
            by_line(lines.first * pitch) + by_cell(cells.first),
            torch.full((n_h, n_w), pitch, dtype=torch.int32),
            by_line(lines.count),
            by_cell(cells.count),
            by_line(torch.arange(n_h, dtype=torch.int32) * lines.weight.shape[1]),
            by_cell(lines.weight.numel() + torch.arange(n_w, dtype=torch.int32) * cells.weight.shape[1]),
        )
    )
    return table.reshape(6, -1), weight, cells.weight.shape[1]


def row_windows(
    grids: tuple[int, ...], sides: tuple[int, ...], mode: str, transposed: bool, device: torch.device
) -> RowWindows:
    """The window table of a batch on ``device``, built on the host once per batch shape.

    ``transposed`` gives the backward pass: output rows are patches, source rows are tokens. Raises ``ValueError`` for
    more than 2**31 - 1 rows, and ``RuntimeError`` if a CUDA graph is being captured before a plain call has built it.
    """
    if device.type != "cuda":
        return _host_windows(grids, sides, mode, transposed)
    windows, is_copied, stream = _device_windows(grids, sides, mode, transposed, device)
    current = torch.cuda.current_stream(device)
    # A graph is captured after its warm-up was waited for; any other stream waits for the copy, on the device.
    if current.cuda_stream != stream and not torch.cuda.is_current_stream_capturing():
        current.wait_event(is_copied)
        windows.table.record_stream(current)
        windows.weight.record_stream(current)
    return windows


@functools.lru_cache(maxsize=CACHED_BATCHES)
def _device_windows(
    grids: tuple[int, ...], sides: tuple[int, ...], mode: str, transposed: bool, device: torch.device
) -> tuple[RowWindows, torch.cuda.Event, int]:
    """The table on a GPU, the event after its copy, and the stream that copied it."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, but this batch shape was never run: its window table would be copied from "
            "host memory at every replay. Run the step once before capturing it"
        )
    host = _host_windows(grids, sides, mode, transposed)
    with torch.cuda.device(device):
        table, weight = (x.pin_memory().to(device, non_blocking=True) for x in (host.table, host.weight))
        stream = torch.cuda.current_stream(device)
        return host._replace(table=table, weight=weight), stream.record_event(), stream.cuda_stream


@functools.lru_cache(maxsize=CACHED_BATCHES)
def _host_windows(grids: tuple[int, ...], sides: tuple[int, ...], mode: str, transposed: bool) -> RowWindows:
    """The table on the host."""
    if max(num_patches(grids), num_patches(sides)) > MAX_ROWS:
        raise ValueError(f"the batch has more than {MAX_ROWS} rows: split it")
    images = list(zip(zip(grids[::2], grids[1::2]), zip(sides[::2], sides[1::2])))
    shapes = list(dict.fromkeys(images))
    offset, weights, weight_offset = 0, [], {}
    for grid, side in shapes:
        weights.append(_image_table(grid, side, mode, transposed)[1])
        weight_offset[grid, side] = offset
        offset += weights[-1].numel()
    tables, source_row = [], 0
    for grid, side in images:
        base = torch.tensor(
            [source_row, 0, 0, 0, weight_offset[grid, side], weight_offset[grid, side]], dtype=torch.int32
        )
        tables.append(_image_table(grid, side, mode, transposed)[0] + base[:, None])
        source = side if transposed else grid
        source_row += source[0] * source[1]
    table = torch.cat(tables, 1) if tables else torch.zeros(6, 0, dtype=torch.int32)
    weight = torch.cat(weights) if weights else torch.zeros(0)
    widest = max((_image_table(grid, side, mode, transposed)[2] for grid, side in shapes), default=1)
    return RowWindows(table.contiguous(), weight, table.shape[1], widest)
