"""`tokenflex plan`: plan an epoch for a cluster from lengths alone, measure it, and write it down.

Memory does not grow with the number of samples: lengths are mapped, windows are planned and written one after the other.
"""

import json
import os
import resource
import tempfile
import time
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..budget import VisualTokenBudget
from ..config import DataConfig, as_probabilities
from ..errors import UserError
from .figures import Figures, totals
from .mixture import Lengths, Mixture, Source, draw_key
from .planner import Planner
from .steps import Dropped

CHUNK = 2**20


def make_planner(lengths: Lengths, arguments: Namespace) -> Planner:
    """The `Planner` of the command's arguments: one micro-step of `ranks` packs is one step.

    Raises:
        UserError: counts and probabilities that do not belong together, or a plan that cannot be.
    """
    counts, probabilities = arguments.counts, arguments.probabilities
    if len(counts) != len(probabilities) or len(set(counts)) < len(counts):
        raise UserError(
            f"--counts {counts} --probabilities {probabilities}: wanted distinct counts and one probability per count"
        )
    if min(counts) < 1 or min(probabilities) < 0:
        raise UserError(
            f"--counts {counts} --probabilities {probabilities}: wanted counts above 0 and no negative share"
        )
    try:
        probabilities = as_probabilities(probabilities)
    except ValueError as error:
        raise UserError(
            f"--probabilities: {error}; wanted distinct counts and one probability per count, 1 together"
        ) from None
    data = DataConfig(
        pack_length=arguments.capacity,
        max_images_per_pack=arguments.max_tiles,
        packs_per_step=arguments.ranks,
        lockstep_packs=arguments.ranks,
        mixing="free" if arguments.mixed_counts else "lockstep",
        window_rows=arguments.window_rows,
        over_long=arguments.over_long,
    )
    budget = VisualTokenBudget(counts=tuple(counts), probabilities=tuple(probabilities))
    mixture = Mixture([Source(index=lengths, over_long=arguments.over_long)])
    return Planner(mixture, budget, data, arguments.seed, "token")


def simulate(
    planner: Planner, epoch: int, out: str | os.PathLike | None = None
) -> tuple[dict[str, Any], Figures, Dropped]:
    """Plan an epoch: (figures dict, `Figures`, `Dropped`). `out` is the .npz that gets `sample`, `pack` and `count`.

    Raises:
        UserError: `out` cannot be written.
    """
    figures = Figures(planner.limits.max_tokens, planner.limits.row_packs, planner.data.cost)
    dropped, first_pack, mixed, anonymous = Dropped(), 0, 0, 0
    writer = Writer(out, planner) if out else None
    memory_before = anonymous_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    seconds = cpu_seconds = 0.0
    for _, window, _ in planner.windows(epoch, dropped=dropped):
        seconds += time.perf_counter() - wall
        cpu_seconds += time.process_time() - cpu
        samples = window.samples
        figures.add(totals(window.pack, samples.tokens, samples.tiles, window.num_packs, planner.data.cost))
        mixed += int((window.row_queue < 0).sum())
        if writer:
            writer.add(samples.id, window.pack + first_pack)
        first_pack += window.num_packs
        anonymous = max(anonymous, anonymous_memory())
        wall, cpu = time.perf_counter(), time.process_time()
    result: dict[str, Any] = figures.result()
    excluded = sum(number for reason, number in dropped.numbers.items() if reason != "truncated at a turn")
    result |= {
        "coverage_of_what_fits": figures.num_samples / max(planner.epoch_size - excluded, 1),
        "left_out": dict(dropped.numbers),
        "rows_of_mixed_counts": mixed,
        "samples_per_s": round(figures.num_samples / max(seconds, 1e-9)),
        "samples_per_cpu_s": round(figures.num_samples / max(cpu_seconds, 1e-9)),
        "memory_mb": round((anonymous - memory_before) / 1e6, 1),
        "process_memory_mb": round(anonymous / 1e6, 1),
        "peak_with_mapped_files_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
    }
    if writer:
        writer.close(epoch)
    return result, figures, dropped


def anonymous_memory() -> int:
    """Bytes of this process that are no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Writer:
    """Arrays of a plan, written as they come and put into one .npz at the end.

    sample [S]: samples in emitted order; pack [S]: the pack of each, every `ranks` packs in a row make a micro-step; count
    [samples]: visual tokens per tile of every sample by its number.
    """

    def __init__(self, path: str | os.PathLike, planner: Planner):
        self.path, self.planner = Path(path), planner
        self.dtype = np.dtype(np.int32 if planner.epoch_size < 2**31 else np.int64)
        try:
            self.folder = tempfile.TemporaryDirectory(prefix=self.path.name + ".", dir=self.path.parent)
        except OSError as error:
            raise UserError(f"--out {path}: {error.strerror}; wanted a file in a folder that can be written") from None
        self.files = {name: open(Path(self.folder.name) / name, "wb") for name in ("sample", "pack")}  # noqa: SIM115
        self.size = 0

    def add(self, sample: np.ndarray, pack: np.ndarray) -> None:
        for name, values in (("sample", sample), ("pack", pack)):
            self.files[name].write(values.astype(self.dtype).tobytes())
        self.size += len(sample)

    def close(self, epoch: int) -> None:
        """Put the file in place, whole or not at all."""
        whole = Path(self.folder.name) / "whole.npz"
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, file in self.files.items():
                file.close()
                self._member(archive, name, self.size, self._chunks(file.name))
            self._member(archive, "count", len(self.planner.mixture), self._counts(epoch))
        os.replace(whole, self.path)
        self.folder.cleanup()

    def _member(self, archive: zipfile.ZipFile, name: str, size: int, chunks: Iterator[bytes]) -> None:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (size,)}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(chunk)

    @staticmethod
    def _chunks(path: str) -> Iterator[bytes]:
        with open(path, "rb") as file:
            while chunk := file.read(2**22):
                yield chunk

    def _counts(self, epoch: int) -> Iterator[bytes]:
        planner = self.planner
        for begin in range(0, len(planner.mixture), CHUNK):
            ids = np.arange(begin, min(begin + CHUNK, len(planner.mixture)))
            yield planner.budget.draw(planner.seed, draw_key(epoch), ids, ids).astype(self.dtype).tobytes()


def describe(result: dict[str, Any], planner: Planner) -> str:
    """The figures as lines of text."""

    def percent(name: str) -> str:
        return f"{100 * result[name]:.2f} %"

    limits = planner.limits
    dropped = ", ".join(f"{number} {reason}" for reason, number in result["left_out"].items()) or "none"
    return "\n".join(
        [
            f"plan         {result['samples']} samples -> {result['packs']} packs of {limits.max_tokens} tokens and {limits.max_tiles} tiles, "
            f"{result['micro_steps']} whole micro-steps of {limits.row_packs} ranks",
            f"coverage     {percent('coverage_of_what_fits')} of what fits; left out: {dropped}",
            f"utilisation  {percent('utilisation')} of the packs' tokens",
            f"waste        language {percent('llm_waste')}, vision {percent('vision_waste')}, ZeRO-3 {percent('z3_waste')}",
            f"effective    {percent('effective')} = utilisation x (1 - ZeRO-3 waste)",
            f"packs        at most {result['max_tokens']} tokens and {result['max_tiles']} tiles; {result['packs_without_image']} without an image; "
            f"{result['rows_of_mixed_counts']} micro-steps of mixed counts",
            f"speed        {result['samples_per_cpu_s']} samples per CPU-second ({result['samples_per_s']} per second)",
            f"memory       {result['memory_mb']} MB for the plan; the process has {result['process_memory_mb']} MB besides mapped files, "
            f"{result['peak_with_mapped_files_mb']} MB with them",
        ]
    )


def plot(figures: Figures, folder: str | os.PathLike) -> None:
    """`fill.png` and `cost.png` under `folder`.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plots: needs the package matplotlib; run: pip install 'tokenflex[quickstart]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.bar(np.arange(1001) / 10, figures.fill, width=0.1)
    lowest = int(np.flatnonzero(figures.fill)[0]) if figures.fill.any() else 0
    axes.set(xlabel="fill of a pack in percent", ylabel="packs", yscale="log", xlim=(min(lowest / 10, 98), 100.2))
    figure.savefig(folder / "fill.png", dpi=120)
    steps = np.array(figures.steps or [(0.0, 0.0, 0.0)])
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    place = np.arange(len(steps))
    axes.fill_between(place, steps[:, 0], steps[:, 2], alpha=0.3, label="fastest rank to what all wait for")
    axes.plot(place, steps[:, 1], linewidth=0.8, label="mean rank")
    axes.set(xlabel="micro-step", ylabel="cost in FLOPs", ylim=(0, None))
    axes.legend()
    figure.savefig(folder / "cost.png", dpi=120)
    plt.close("all")


def write_json(result: dict[str, Any], path: str | os.PathLike) -> None:
    """Write the figures.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}; wanted a file that can be written") from None
