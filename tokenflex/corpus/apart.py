"""Pretraining in a process of its own, whose sums round alike wherever it runs.

Why this file exists: every run of a study starts from the parts pretrained here, and runs that start from other bits are not
compared. Left alone, matrix products take the fastest path of the processor and the number of its cores, and another machine
has other bits after one step. With the settings below, six steps of both parts were the same to the bit on an AMD with AVX-512
and on an emulated Intel Haswell. What is trained afterwards is left at its machine's own speed.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

from ..errors import UserError

SAME_SUMS = {
    "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_DYNAMIC": "false", "MKL_DYNAMIC": "false",
    "MKL_CBWR": "COMPATIBLE",  # the only path that MKL takes on every maker's processors; AVX2 it heeds on Intel's alone
    "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
}  # fmt: skip


def pretrain_apart(part: str, folder: Path, seed: int, num_steps: int | None = None) -> Path:
    """Returns `folder`, holding the part, `encoder` or `language`, pretrained if it is not there; `num_steps` is for trials.

    The process ends with this one. On a processor without AVX2 it takes that processor's own path, and bits.

    Raises:
        UserError: it failed; names what it said last.
    """
    environment = {**os.environ, **(SAME_SUMS if has_avx2() else {})}
    command = [sys.executable, "-m", __name__, part, str(folder), str(seed), *([str(num_steps)] if num_steps else [])]
    # Its input stays open for as long as this process and this block live.
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None  # it is a pipe
        said = process.stderr.read()
        if process.wait():
            last = (said.strip().splitlines() or ["nothing"])[-1]
            raise UserError(f"pretraining the {part} into {folder}: ended with status {process.returncode}: {last}")
    return folder


def has_avx2() -> bool:
    """Whether the processor has AVX2, whatever torch was told to use of it (`ATEN_CPU_CAPABILITY`)."""
    return "avx2" in Path("/proc/cpuinfo").read_text().split()


def _end_with_parent() -> None:
    """The parent's end closes the pipe, however it ends."""

    def wait_and_end() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def _main() -> None:
    part, folder, seed, *num_steps = sys.argv[1:]
    _end_with_parent()
    further = {"num_steps": int(num_steps[0])} if num_steps else {}
    from . import encoder, language

    build = {"encoder": encoder.build_encoder, "language": language.build_language_model}[part]
    build(Path(folder), seed=int(seed), **further)


if __name__ == "__main__":
    _main()
