"""One log of all ranks: follows the files that SLURM writes per rank and merges their lines as they come."""

import sys
import threading
import time
from os import PathLike
from pathlib import Path
from typing import TextIO

INTERVAL_S = 0.5


class MergedLog:
    """Copies whole lines of `folder/rank-*.log` to `folder/merged.log` and to standard output, marked with time and rank.

    Lines stand in the order in which they were seen. Use as a context manager: leaving it drains the files.
    """

    def __init__(self, folder: str | PathLike, output: TextIO | None = None):
        self.folder = Path(folder)
        self.output = output or sys.stdout
        self._places: dict[Path, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "MergedLog":
        self._file = open(self.folder / "merged.log", "a", encoding="utf-8")  # noqa: SIM115  closed in __exit__
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._copy(is_last=True)
        self._file.close()

    def _follow(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._copy()

    def _copy(self, is_last: bool = False) -> None:
        stamp = time.strftime("%H:%M:%S")
        for path in sorted(self.folder.glob("rank-*.log")):
            place = self._places.get(path, 0)
            with open(path, "rb") as file:
                file.seek(place)
                text = file.read()
            end = len(text) if is_last else text.rfind(b"\n") + 1
            self._places[path] = place + end
            rank = path.stem.removeprefix("rank-")
            for line in text[:end].decode(errors="replace").splitlines():
                marked = f"{stamp} [{rank}] {line}\n"
                self._file.write(marked)
                self.output.write(marked)
        self._file.flush()
        self.output.flush()
