"""The folder of a run's checkpoints: what is in it, which of it can be trusted, what may go."""

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from .. import failpoints
from ..errors import UserError
from ..layout import RunLayout, step_of
from .disk import checksum_of, remove_folder, replace_synced, write_synced
from .manifest import Damaged, FileEntry, Manifest, read_manifest

LATEST = "latest"
WRITING = ".writing-"
REMOVED = ".removed-"


def tags(folder: str | PathLike) -> list[str]:
    """Names of the checkpoints under `folder`, oldest first, good or not."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [(step, path.name) for path in folder.iterdir() if (step := step_of(path.name)) is not None]
    return [tag for _, tag in sorted(found)]


def checked_manifest(folder: str | PathLike) -> Manifest:
    """A checkpoint's manifest, once every file it names is there with its size.

    Raises:
        Damaged: with the reason.
    """
    folder = Path(folder)
    if folder.is_symlink():
        raise Damaged("is a link, which is never followed")
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        check_size(folder / name, entry)
    return manifest


def check_files(folder: str | PathLike, manifest: Manifest, rank: int = 0, num_ranks: int = 1) -> None:
    """Compare this rank's share of a checkpoint's files with their sizes and checksums.

    Raises:
        Damaged: one differs or cannot be read.
    """
    for name in sorted(manifest.files)[rank::num_ranks]:
        check_file(Path(folder) / name, manifest.files[name])


def check_size(path: Path, entry: FileEntry) -> None:
    """See that a file is there with the size that the manifest says.

    Raises:
        Damaged: it is not.
    """
    if path.is_symlink() or not path.is_file():
        raise Damaged(f"{path.name} is missing" if not os.path.lexists(path) else f"{path.name} is no regular file")
    if path.stat().st_size != entry["size"]:
        raise Damaged(f"{path.name} has {path.stat().st_size} bytes, the manifest says {entry['size']}")


def check_file(path: Path, entry: FileEntry) -> None:
    """Compare a file with what the manifest says of it.

    Raises:
        Damaged: it differs or cannot be read.
    """
    check_size(path, entry)
    try:
        found = checksum_of(path)
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from None
    if found != entry["blake3"]:
        raise Damaged(f"{path.name} does not match its checksum")


@dataclass(frozen=True)
class Entry:
    """A checkpoint as `ls` and retention see it: `manifest` is None where `problem` says why."""

    tag: str
    manifest: Manifest | None
    problem: str = ""

    def describe(self, is_latest: bool = False) -> str:
        """One line for a person."""
        if self.manifest is None:
            return f"{self.tag}  damaged: {self.problem}"
        m = self.manifest
        what = "validation" if m.config.get("evaluate", {}).get("every") else "mean"
        score = "" if m.score is None else f"  {what} loss {m.score:.4f}"
        mark = "  latest" if is_latest else ""
        return f"{self.tag}  {m.time}  {m.num_bytes / 1e6:.1f} MB  {m.num_ranks} ranks{score}{mark}"


def entries(folder: str | PathLike, is_thorough: bool = False) -> list[Entry]:
    """Every checkpoint under `folder`, oldest first; `is_thorough` reads all bytes and compares checksums."""
    found = []
    for tag in tags(folder):
        try:
            manifest = checked_manifest(Path(folder) / tag)
            if is_thorough:
                check_files(Path(folder) / tag, manifest)
            found.append(Entry(tag, manifest))
        except Damaged as problem:
            found.append(Entry(tag, None, str(problem)))
    return found


def run_entries(folder: str | PathLike, is_thorough: bool = False) -> tuple[Path, list[Entry]]:
    """(folder of checkpoints, its `entries`) of a run's folder, or of that folder itself.

    Raises:
        UserError: there is no checkpoint.
    """
    place = RunLayout(Path(folder)).checkpoints
    place = place if place.is_dir() else Path(folder)
    found = entries(place, is_thorough)
    if not found:
        raise UserError(f"{folder}: no checkpoint there; give a run's folder, for example runs/quickstart")
    return place, found


def latest_tag(folder: str | PathLike) -> str:
    """What `latest` points to, or an empty string. For people: resuming looks at every checkpoint, newest first."""
    with contextlib.suppress(OSError):
        text = (Path(folder) / LATEST).read_text(encoding="ascii", errors="replace").strip()
        return text if step_of(text) is not None else ""
    return ""


def point_latest(folder: str | PathLike, tag: str, attempt: str) -> None:
    """Replace `latest` atomically."""
    temporary = Path(folder) / f"{WRITING}{LATEST}-{attempt}"
    try:
        write_synced(temporary, tag.encode())
        failpoints.hit("latest")
        replace_synced(temporary, Path(folder) / LATEST)
    finally:
        temporary.unlink(missing_ok=True)  # still there only if it could not take its place


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What is kept: the newest `last`, every checkpoint whose step is a multiple of `every` (0: none), and the `best`."""

    last: int
    every: int = 0
    best: int = 0

    def kept(self, found: Sequence[Entry]) -> set[str]:
        """Tags that stay of `found` (`Entry`s, oldest first). Damaged ones count for nothing and stay while no newer one is good."""
        good = [(entry.tag, entry.manifest) for entry in found if entry.manifest]
        keep = {tag for tag, _ in good[-self.last :]}
        if self.every:
            keep |= {tag for tag, manifest in good if manifest.step % self.every == 0}
        scored = [(manifest.score, tag) for tag, manifest in good if manifest.score is not None]
        keep |= {tag for _, tag in sorted(scored, key=lambda entry: entry[0])[: self.best]}
        newest_good = good[-1][1].step if good else -1
        return keep | {entry.tag for entry in found if not entry.manifest and (step_of(entry.tag) or 0) > newest_good}


def clean_up(folder: str | PathLike, retention: Retention) -> list[str]:
    """Remove checkpoints beyond retention; returns their tags."""
    found = entries(folder)
    kept = retention.kept(found)
    gone = [entry.tag for entry in found if entry.tag not in kept]
    for tag in gone:
        failpoints.hit("clean-up")
        remove_folder(Path(folder) / tag)
    return gone


def sweep(folder: str | PathLike) -> None:
    """Remove what earlier starts left half done; only the holder of the run's lock may call it."""
    for path in Path(folder).glob(".*"):
        if path.name.startswith((WRITING, REMOVED)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
