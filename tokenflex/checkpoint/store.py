"""Saving and loading a run's state over any number of ranks.

A save has three parts. A thread copies the rank's slices to host memory while the next step runs forward and backward; only
the update that would change them waits for it. The thread then writes and syncs the rank's file. Once the ranks agree, at the end of some later step, that all files are down, rank 0's
thread writes the manifest, gives the folder its name, moves `latest` and removes what retention lets go. Threads never
communicate: what they have to say travels with the agreement that ends every step.
"""

import copy
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from .. import failpoints
from ..errors import UserError
from ..layout import MANIFEST, step_of, tag_of
from .disk import free_bytes, remove_folder, replace_synced, sync_folder, write_synced
from .folder import WRITING, Retention, clean_up, point_latest, sweep, tags
from .frozen import FrozenFile, checked_and_repaired
from .manifest import Damaged, Manifest, encode
from .places import Place, files_with, gathered_places
from .shard import ShardReader, frozen_name, shard_name, slice_name, write_shard

WEIGHT = "weight"
AVERAGE = "average"
T = TypeVar("T")


class CheckpointRanks(Protocol):
    """The ranks that save and load together; see `tokenflex.parallel.Ranks`."""

    rank: int
    num_ranks: int

    def all_reduce_max(self, numbers: Sequence[float], /) -> list[float]:
        """Element-wise maximum over all ranks."""

    def all_gather(self, value: T, /) -> list[T]:
        """Every rank's value, on every rank."""


class HeldSlice(Protocol):
    """What a rank holds of one parameter and of its moments; see `tokenflex.parallel.slices.Slice`."""

    @property
    def name(self) -> str:
        """Of the parameter."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""

    @property
    def start(self) -> int:
        """Its first element here, of the parameter laid flat."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """{kind: live elements from `start` on}, 1-D."""

    def share(self, rank: int, num_ranks: int) -> tuple[int, dict[str, torch.Tensor]]:
        """(start, tensors) of what this rank saves."""

    def place(self, rank: int, num_ranks: int) -> Place:
        """Where the parameter lies over the files of all ranks, as far as this rank can say."""


@dataclass(frozen=True)
class Pieces:
    """What a rank saves of its slices.

    trained, frozen: {name in the file: live tensor}. places: {parameter: where it lies}, this rank's part of the manifest's.
    """

    trained: dict[str, torch.Tensor]
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """How a save ended. `problem` is empty on success; `seconds` runs from the copy to the end.

    `stall_s`: what the step loop waited. `num_bytes`: written by all ranks. `note` is what went wrong once the checkpoint stood: `latest` not moved, an old checkpoint not removed.
    """

    step: int
    problem: str
    note: str
    seconds: float
    stall_s: float
    num_bytes: int


class CheckpointWriter:
    """Saves in the background, one checkpoint at a time. Every rank has one, and calls it in step with the others.

    Args:
        folder: of the run's checkpoints.
        ranks: the job.
        retention: what is kept.
        attempt: a name for this start of the run, the same on all ranks.
        describe: (progress) -> the manifest's other fields.
    """

    def __init__(
        self,
        folder: str | PathLike,
        ranks: CheckpointRanks,
        retention: Retention,
        attempt: str,
        describe: Callable[[dict[str, Any]], dict[str, Any]],
    ):
        self.folder, self.ranks, self.retention, self.attempt = Path(folder), ranks, retention, attempt
        self.describe = describe
        self.stall_s = 0.0
        self._frozen_file = FrozenFile(self.folder, num_copies=min(2, retention.last))
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread = threading.Thread()  # of the part of a save that runs; none does yet
        self._result: Any = None
        self._problem: str | None = None
        self._crash: Exception | None = None
        self._is_copied = threading.Event()
        self._is_copied.set()
        self._phase = "idle"
        self._saved_step: int | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no save is under way."""
        return self._phase == "idle"

    def start(self, pieces: Pieces, passing: Mapping[str, torch.Tensor], progress: dict[str, Any]) -> Saved | None:
        """Begin to save: what no one changes before the next update, and {name: tensor} of what may change at once.

        `passing` (small) is copied here and now, what is trained in the background: call `before_update` before weights or
        moments move. What is frozen is written where the disk does not have it yet. A save that is still under way is brought to its end first, and returned as `Saved`; the state of
        the step just saved or loaded is not saved again.
        """
        begin = time.perf_counter()
        before = self.finish() if not self.is_idle else None
        step = progress["step"]
        if step == self._saved_step:
            return before
        failpoints.hit("snapshot", step)
        copied = {name: self._copy(name, tensor) for name, tensor in passing.items()}
        is_moved = torch.cuda.Event() if torch.cuda.is_available() else None
        if is_moved:
            is_moved.record()
        self._step, self._progress, self._begin = step, copy.deepcopy(progress), begin
        self._described = self.describe(self._progress)
        self._place = self.folder / f"{WRITING}{tag_of(step)}-{self.attempt}"
        self._is_copied.clear()
        self._run(self._write, pieces, copied, is_moved)
        self._phase = "writing"
        self.stall_s = time.perf_counter() - begin
        return before

    def before_update(self) -> None:
        """Wait until the state that is being saved has been copied; it may change from now on."""
        begin = time.perf_counter()
        self._is_copied.wait()
        if self._phase == "writing":
            self.stall_s += time.perf_counter() - begin

    def flags(self) -> list[float]:
        """What this rank has to say at the end of a step: [its thread is busy, it has failed]."""
        return [float(self._thread.is_alive()), float(self._problem is not None)]

    def advance(self, is_busy: float, has_failed: float) -> Saved | None:
        """Go on, with the flags' maximum over all ranks; returns a `Saved` when a save has ended."""
        if self.is_idle or is_busy:
            return None
        self._thread.join()
        if self._crash is not None:
            raise self._crash
        if self._phase == "writing" and not has_failed:
            parts = self.ranks.all_gather(self._result)
            self._files = {name: entry for part in parts for name, entry in part["files"].items()}
            self._num_bytes = sum(part["num_bytes"] for part in parts)
            self._places = gathered_places(part["places"] for part in parts)
            self._run(self._commit if self.ranks.rank == 0 else _nothing)
            self._phase = "committing"
            return None
        problems = [p for p in self.ranks.all_gather(self._problem) if p] if has_failed else []
        note = "" if problems or self.ranks.rank else self._result
        if has_failed and self.ranks.rank == 0:
            shutil.rmtree(self._place, ignore_errors=True)
        self._phase, self._problem = "idle", None
        self._saved_step = None if problems else self._step
        num_bytes = 0 if problems else self._num_bytes
        return Saved(self._step, "; ".join(problems), note, time.perf_counter() - self._begin, self.stall_s, num_bytes)

    def finish(self) -> Saved | None:
        """Wait for a save under way; returns how it ended, or None where there was none. Every rank must call it."""
        saved = None
        while not self.is_idle:
            if self._thread.is_alive():
                self._thread.join(0.02)
            saved = self.advance(*self.ranks.all_reduce_max(self.flags())) or saved
        return saved

    def forget(self) -> None:
        """The state has been replaced: saving it is no repetition."""
        self._saved_step = None

    def loaded(self, step: int) -> None:
        """The state is that of a good checkpoint."""
        self._saved_step = step

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=True)

    def _run(self, work: Callable[..., Any], *arguments: Any) -> None:
        self._thread = threading.Thread(target=self._guarded, args=(work, arguments), name="checkpoint", daemon=True)
        self._thread.start()

    def _guarded(self, work: Callable[..., Any], arguments: tuple) -> None:
        """Run a part of a save; an error of the disk is a failed save, not the end of the run."""
        try:
            self._result = work(*arguments)
        except OSError as error:
            self._problem = self._explain(error)
        except Exception as error:
            self._crash = error  # raised where the step loop meets it
        finally:
            self._is_copied.set()

    def _explain(self, error: OSError) -> str:
        where = error.filename or self.folder
        return f"rank {self.ranks.rank}: {where}: {error.strerror or error} ({_free(self.folder)} bytes free)"

    def _write(
        self, pieces: Pieces, copied: dict[str, torch.Tensor], is_moved: torch.cuda.Event | None
    ) -> dict[str, Any]:
        lasting, rank, num_ranks = pieces.trained, self.ranks.rank, self.ranks.num_ranks
        if is_moved:  # on a stream of its own, behind the last update and beside the next forward pass
            with torch.cuda.stream(torch.cuda.Stream()):
                stream = torch.cuda.current_stream()
                stream.wait_event(is_moved)
                copied |= {name: self._copy(name, tensor) for name, tensor in lasting.items()}
                stream.synchronize()
        else:
            copied |= {name: self._copy(name, tensor) for name, tensor in lasting.items()}
        self._is_copied.set()
        self._place.mkdir(parents=True, exist_ok=True)
        name = shard_name(rank, num_ranks)
        files = {name: write_shard(self._place / name, copied, self._step)}
        num_bytes = files[name]["size"]
        if pieces.frozen:
            name = frozen_name(rank, num_ranks)
            target = self.folder / tag_of(self._step) / name
            files[name], written = self._frozen_file.put(self._place / name, target, pieces.frozen, self._step)
            num_bytes += written
        return {"files": files, "num_bytes": num_bytes, "places": pieces.places}

    def _commit(self) -> str:
        manifest = Manifest(
            progress=self._progress,
            files=self._files,
            num_ranks=self.ranks.num_ranks,
            attempt=self.attempt,
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            places=self._places,
            **self._described,
        )
        failpoints.hit("manifest", self._step)
        write_synced(self._place / MANIFEST, encode(manifest))
        sync_folder(self._place)
        failpoints.hit("rename", self._step)
        target = self.folder / tag_of(self._step)
        if target.exists():  # damaged, or of a past that the run has turned away from
            remove_folder(target)
        replace_synced(self._place, target)
        try:  # the checkpoint stands: what fails from here on does not undo it
            point_latest(self.folder, target.name, self.attempt)
            clean_up(self.folder, self.retention)
        except OSError as error:
            return self._explain(error)
        return ""


@dataclass(frozen=True)
class Loaded:
    """What was loaded: the manifest, where it lay, and (tag, reason) of each newer checkpoint that was passed over."""

    manifest: Manifest
    tag: str
    passed_over: tuple[tuple[str, str], ...]


Checked = tuple[Manifest | None, str | None, list[str]]
"""(manifest, None, what was repaired) of a checkpoint whose files are good, else (None, what is wrong, [])."""


class EarlyCheck:
    """Checks this rank's share of the newest checkpoint from a thread, while the model is being built.

    The bytes are then in the page cache when they are wanted, and the check costs the start no time of its own. What it
    found counts only while no file has changed since.
    """

    def __init__(self, folder: str | PathLike, rank: int, num_ranks: int):
        self._place = (Path(folder), rank, num_ranks)
        self._found: tuple[str, list | None, Checked] = ("", None, (None, None, []))
        self._thread = threading.Thread(target=self._run, name="check", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        folder, *share = self._place
        for tag in reversed(tags(folder)):
            stamps = _stamps(folder / tag)
            self._found = (tag, stamps, check(folder / tag, *share))
            return

    def __call__(self, place: Path, *share: int) -> Checked:
        """As `check`, from what was found early if it is of the same checkpoint and files."""
        self._thread.join()
        tag, stamps, found = self._found
        if (place.parent, *share) == self._place and tag == place.name and stamps == _stamps(place):
            return found
        return check(place, *share)


def check(place: Path, rank: int, num_ranks: int) -> Checked:
    """What is wrong with a checkpoint, by this rank's share of its files; what can be repaired is, and named."""
    try:
        manifest, repaired = checked_and_repaired(place, rank, num_ranks)
    except Damaged as damage:
        return None, str(damage), []
    return manifest, None, repaired


def _stamps(place: Path) -> list[tuple[str, int, int, int, int]] | None:
    """What changes when a file is written or replaced."""
    try:
        found = [(path.name, path.lstat()) for path in sorted(place.iterdir())]
    except OSError:
        return None
    return [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found]


def load_newest(
    folder: str | PathLike,
    ranks: CheckpointRanks,
    fill: Callable[[Manifest, Path], None],
    max_step: int | None = None,
    say: Callable[[str], None] = print,
    check: Callable[[Path, int, int], Checked] = check,
) -> Loaded | None:
    """Load the newest good checkpoint of a run; returns `Loaded`, or None where the run has no checkpoint at all.

    Every rank must call it; each verifies its share of the files before `fill(manifest, folder)` on any rank may touch the
    model. `max_step`: look at no newer one. `check`: `check`, or an `EarlyCheck` begun before.

    Raises:
        UserError: there are checkpoints, but none is good: a run never silently begins anew.
    """
    passed_over: list[tuple[str, str]] = []
    wanted = [tag for tag in tags(folder) if max_step is None or (step_of(tag) or 0) <= max_step]
    candidates = ranks.all_gather(wanted)[0]
    for tag in reversed(candidates):
        manifest, problem, repaired = check(Path(folder) / tag, ranks.rank, ranks.num_ranks)
        answers = ranks.all_gather((problem, repaired))
        problems = [text for text, _ in answers if text]
        for text in (text for _, texts in answers for text in texts):
            say(f"repaired  checkpoint {Path(folder) / tag}: {text}")
        if manifest is not None and not problems:
            failpoints.hit("load")
            fill(manifest, Path(folder) / tag)
            return Loaded(manifest, tag, tuple(passed_over))
        passed_over.append((tag, problems[0]))
        say(f"damaged   checkpoint {Path(folder) / tag}: {problems[0]}; passed over")
    if passed_over:
        listed = "; ".join(f"{tag}: {reason}" for tag, reason in passed_over)
        raise UserError(
            f"checkpoints {folder}: none of {len(passed_over)} can be loaded ({listed}); restore one, or begin anew with --fresh"
        )
    return None


def read_slices(folder: str | PathLike, manifest: Manifest, slices: Sequence[HeldSlice], rank: int) -> None:
    """Fill the live `slices` of this rank from a verified checkpoint of any number of ranks.

    Raises:
        UserError: the checkpoint is of another model: the first parameter that differs is named.
    """
    check_fits(folder, manifest, {s.name: (list(s.shape), len(s.tensors) > 1) for s in slices})
    wanted = [
        (s, kind, torch.empty_like(t, device="cpu") if t.is_cuda else t)
        for s in slices
        for kind, t in s.tensors.items()
    ]
    missing = {id(target): target.numel() for _, _, target in wanted}
    holders = {s.name: set(files_with(manifest, s.name, s.start, s.tensors[WEIGHT].numel())) for s in slices}
    names = sorted(set().union(*holders.values()))
    own = rank % max(1, len(names))
    for name in names[own:] + names[:own]:  # ranks begin at different files
        if not any(missing.values()):
            break
        with ShardReader(Path(folder) / name) as reader:
            for piece, kind, target in wanted:
                if missing[id(target)] and name in holders[piece.name]:
                    missing[id(target)] -= reader.copy_into(target, kind, piece.name, piece.start)
    for piece, kind, target in wanted:
        if kind == AVERAGE and missing[id(target)] == target.numel():  # the run kept none until now: it begins here
            target.copy_(piece.tensors[WEIGHT])
        elif missing[id(target)]:
            raise UserError(
                f"checkpoint {folder}: lacks {missing[id(target)]} elements of {kind} of {piece.name}; it was written incompletely"
            )
        if target is not piece.tensors[kind]:
            piece.tensors[kind].copy_(target)


def check_fits(
    folder: str | PathLike, manifest: Manifest, parameters: Mapping[str, tuple[list[int], bool]], is_whole: bool = False
) -> None:
    """Compare {name: (shape, is_trained)} of a model's parameters with a checkpoint's; `is_whole`: they are all it has.

    Raises:
        UserError: a parameter is missing on either side, or of another shape, or was frozen where it is trained now (or the
            reverse).
    """
    for name in sorted(manifest.parameters.keys() - parameters.keys()) if is_whole else ():
        raise UserError(
            f"checkpoint {folder}: has a parameter {name} that the model lacks; set the model back, choose another name=..., "
            "or begin anew with --fresh"
        )
    for name, (shape, is_trained) in parameters.items():
        found = manifest.parameters.get(name)
        if found is None:
            raise UserError(
                f"checkpoint {folder}: has no parameter {name}; it is of another model: choose another name=..., or --fresh"
            )
        if found[0] != shape:
            raise UserError(
                f"checkpoint {folder}: {name} has shape {found[0]}, the model's is {shape}; set the model back, choose another "
                "name=..., or begin anew with --fresh"
            )
        if found[2] != is_trained:
            words = ("frozen", "trained")
            raise UserError(
                f"checkpoint {folder}: {name} was {words[found[2]]}, now it is {words[is_trained]}; set optimizer.*.train back, "
                "choose another name=... with model.init_from, or begin anew with --fresh"
            )


def read_whole(folder: str | PathLike, manifest: Manifest, kind: str = WEIGHT) -> dict[str, torch.Tensor]:
    """{name: whole tensor} of a kind for every parameter of a verified checkpoint, and its buffers for weights."""
    state: dict[str, torch.Tensor] = {}
    for name in sorted(manifest.files):
        with ShardReader(Path(folder) / name) as reader:
            for found, parameter in reader.slices:
                if found == kind:
                    shape, dtype, _ = manifest.parameters[parameter]
                    if parameter not in state:
                        state[parameter] = torch.empty(shape, dtype=getattr(torch, dtype))
                    reader.copy_into(state[parameter].view(-1), kind, parameter, 0)
            if kind == WEIGHT:
                state.update({buffer: reader.tensor("buffer", buffer) for buffer in reader.names("buffer")})
    return state


def named_pieces(slices: Sequence[HeldSlice], rank: int, num_ranks: int) -> Pieces:
    """What this rank saves of its `slices`; one without moments is frozen."""
    pieces = Pieces({})
    for piece in slices:
        start, tensors = piece.share(rank, num_ranks)
        file = pieces.trained if len(tensors) > 1 else pieces.frozen
        file.update({slice_name(kind, piece.name, start): tensor for kind, tensor in tensors.items() if tensor.numel()})
        place = piece.place(rank, num_ranks)
        if rank == 0 or isinstance(
            place, list
        ):  # rank 0 has a part of what is cut by a rule, and need not hear it from all
            pieces.places[piece.name] = place
    return pieces


def begin_folder(folder: str | PathLike, rank: int) -> None:
    """Make the folder and, on rank 0, remove what earlier starts left half done."""
    if rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        sweep(folder)


def _nothing() -> None:
    return None


def _free(folder: Path) -> int | str:
    try:
        return free_bytes(folder)
    except OSError:
        return "unknown"
