"""Is this machine fit to train? Every check is a line: what was found, whether it will do, and what to do where it will not.

`examine` is the whole; its findings go into every run's folder, so that what a run met can be read afterwards. Secrets are never
read out: of a token it is said that there is one.
"""

import os
import platform
import re
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement

OK: Literal["ok"] = "ok"
WARN: Literal["warn"] = "warn"
FAIL: Literal["fail"] = "fail"
GIB = 2**30
MIN_FREE = 20 * GIB
"""Bytes on a disk below which a warning comes: a checkpoint of a billion parameters has 12."""
MIN_SHARED = GIB
MIN_FILES = 4096
MIN_DRIVER = 525
"""NVIDIA's driver branch of CUDA 12."""
BLOCK = 64 * 2**20
SLOW_DISK = 200e6
"""Bytes per second below which saving takes minutes per 10 GB."""
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
CUDA_PACKAGES = {
    "flash-attn": "attention runs on torch's own kernels",
    "liger-kernel": "RMSNorm, RoPE and SwiGLU are plain torch",
}
"""Packages that are worth having on a GPU, and what happens without them."""


@dataclass(frozen=True)
class Finding:
    """A check's answer. status: ok, warn (it runs, but ...) or fail (it will not run). advice: what to do; empty where it is ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def examine(
    folders: Sequence[str | PathLike] = (),
    *,
    is_thorough: bool = True,
    port: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> list[Finding]:
    """Every check of this machine, in order.

    Args:
        folders: that a run writes to. They are not made; of one that is not there its nearest parent is looked at.
        is_thorough: also measure disks and run the kernels, which takes seconds; without, nothing is written.
        port: that ranks would meet at; by default none is tried.
    """
    findings = [
        *_python(),
        *_packages(),
        *_gpus(),
        *_extras(),
        *_kernels(is_thorough),
        *_compiler(),
        *_memory(environment),
    ]
    for folder in dict.fromkeys([*map(str, folders), tempfile.gettempdir()]):
        findings += _disk(Path(folder).expanduser(), is_thorough)
    return [*findings, *_shared_memory(), *_open_files(), *_port(port), *_hub(environment)]


def describe(findings: Sequence[Finding]) -> str:
    """A line for each finding."""
    width = max(len(finding.name) for finding in findings)
    lines = [
        f"{item.status:4s}  {item.name:{width}s}  {item.found}" + f"; {item.advice}" * bool(item.advice)
        for item in findings
    ]
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Findings as plain JSON values, with the machine and the time."""
    place = {"host": socket.gethostname(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return {**place, "findings": [asdict(finding) for finding in findings]}


def worst(findings: Sequence[Finding]) -> str:
    """The worst status of all."""
    statuses = {finding.status for finding in findings}
    return next((status for status in (FAIL, WARN) if status in statuses), OK)


def _python() -> Iterator[Finding]:
    wanted = str(metadata.metadata("tokenflex")["Requires-Python"] or "") if _version("tokenflex") else ""
    is_fit = not wanted or Requirement(f"python{wanted}").specifier.contains(platform.python_version())
    yield _finding(
        "python", FAIL, is_fit, platform.python_version(), f"install one of {wanted}: make PYTHON=python3.12 ..."
    )


def _packages() -> Iterator[Finding]:
    """What the package asks for: installed, and of a release in the range."""
    asked = [Requirement(text) for text in metadata.requires("tokenflex") or ()] if _version("tokenflex") else []
    if not asked:
        yield Finding(
            "packages", WARN, "tokenflex is not installed as a package", "pip install -e . to have versions checked"
        )
    for wanted in asked:
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version, fix = _version(wanted.name), f"pip install '{wanted.name}{wanted.specifier}'"
        if version is None:
            yield Finding(wanted.name, FAIL, "not installed", fix)
        else:
            is_fit = wanted.specifier.contains(version, prereleases=True)
            yield _finding(wanted.name, WARN, is_fit, version, f"outside of {wanted.specifier}, which is tested: {fix}")


def _gpus() -> Iterator[Finding]:
    if torch.version.cuda is None and torch.version.hip is None:
        yield Finding(
            "gpu", WARN, f"torch {torch.__version__} is built for CPUs", "install a CUDA build to train on GPUs"
        )
        return
    if not torch.cuda.is_available():
        yield Finding(
            "gpu", WARN, "torch sees none", "check nvidia-smi and CUDA_VISIBLE_DEVICES; training runs on the CPU"
        )
        return
    for number in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(number)
        found = f"{seen.name}, {seen.total_memory / 1e9:.0f} GB, sm_{seen.major}{seen.minor}"
        advice = "has no bf16 of its own: set train.precision=fp32, or take a GPU from Ampere on"
        yield _finding(f"gpu {number}", WARN, seen.major >= 8, found, advice)
    yield from _driver(Path("/proc/driver/nvidia/version"))
    yield Finding("nccl", OK, ".".join(map(str, torch.cuda.nccl.version())))


def _driver(path: Path) -> Iterator[Finding]:
    found = re.search(r"Kernel Module\D*(\d+)[\d.]*", path.read_text()) if path.exists() else None
    if found:
        advice = f"older than {MIN_DRIVER}, which CUDA 12 wants: ask for a newer driver"
        version = found[0].split()[-1]
        yield _finding("driver", WARN, int(found[1]) >= MIN_DRIVER, version, advice)


def _extras() -> Iterator[Finding]:
    for name, without in CUDA_PACKAGES.items():
        version = _version(name)
        if version is None and torch.cuda.is_available():
            yield Finding(name, WARN, f"not installed: {without}", "pip install 'tokenflex[gpu]'")
        elif version is not None:
            yield Finding(name, OK, version)


def _kernels(is_thorough: bool) -> Iterator[Finding]:
    try:
        import tokenflex_kernels as kernels
    except ImportError:
        yield Finding(
            "kernels", WARN, "tokenflex_kernels is not installed", "pip install -e . installs it; plain torch runs"
        )
        return
    if not kernels.is_available():
        yield Finding("kernels", OK, "not for this machine; plain torch runs")
    elif not is_thorough:
        yield Finding("kernels", OK, "there, not tried here")
    else:
        error = kernel_error(torch.device("cuda"))
        advice = "do not use them: model.projector_backend=reference; please report GPU, torch and triton"
        yield _finding("kernels", FAIL, error < 0.02, f"off by {error:.1e} from plain torch in bf16", advice)


def kernel_error(device: torch.device) -> float:
    """Relative difference between the projector's kernels and their statement in plain torch, output and gradients, in bf16."""
    import tokenflex_kernels as kernels

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device, torch.bfloat16).requires_grad_()

    grids, sides = [(27, 27), (13, 7)], [(8, 8), (3, 5)]
    plan = kernels.pool_plan(grids, sides, "adaptive", device)
    tensors = (
        drawn(27 * 27 + 13 * 7, 128),
        drawn(128),
        drawn(128),
        drawn(768, 128),
        drawn(768),
        drawn(64, 384),
        drawn(64),
    )
    results = []
    for run in (kernels.pooled_swiglu, kernels.reference.pooled_swiglu):
        features, scale, shift, *linears = tensors
        norm = kernels.Norm(scale, shift, 1e-6)
        output = run(features, plan, norm, kernels.Linear(*linears[:2]), kernels.Linear(*linears[2:]))
        results.append([output, *torch.autograd.grad(output.float().square().sum(), tensors)])
    pairs = [(got.float(), wanted.float()) for got, wanted in zip(*results)]
    return max(float((got - wanted).detach().norm() / wanted.detach().norm().clamp_min(1e-20)) for got, wanted in pairs)


def _compiler() -> Iterator[Finding]:
    found = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
    advice = "install one (apt install g++): Triton and DeepSpeed compile at first use"
    yield _finding(
        "compiler", FAIL if torch.cuda.is_available() else WARN, bool(found), found or "no C++ compiler", advice
    )


def _memory(environment: Mapping[str, str]) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = environment.get("OMP_NUM_THREADS")
    found = f"{cores} of {os.cpu_count()} cores, {total / 1e9:.0f} GB" + (
        f", OMP_NUM_THREADS={threads}" if threads else ""
    )
    yield Finding("cpu", OK, found)


def _disk(folder: Path, is_thorough: bool) -> Iterator[Finding]:
    place, name = _existing(folder), f"disk {folder}"
    status = os.statvfs(place)
    free, files = status.f_bavail * status.f_frsize, status.f_favail
    found = f"{free / 1e9:.0f} GB free" + (f" in {place}" if place != folder else "")
    if not os.access(place, os.W_OK):
        yield Finding(
            name, FAIL, f"{place} cannot be written to", "set output_dir or data.cache_dir to a folder that can"
        )
        return
    if is_thorough:
        written, read = disk_speed(place)
        found += f", writes {written / 1e6:.0f} MB/s, reads {read / 1e6:.0f} MB/s"
        if written < SLOW_DISK:
            yield Finding(name, WARN, found, "checkpoints will take long: a faster disk, or a larger train.save_every")
            return
    is_fit = free >= MIN_FREE and (files > 10_000 or not status.f_files)
    yield _finding(name, WARN, is_fit, found, f"less than {MIN_FREE / GIB:.0f} GiB, or hardly any files: make room")


def disk_speed(folder: Path) -> tuple[float, float]:
    """Bytes per second of writing (synced) and of reading 64 MiB under a folder; what is read may still be in memory.

    Raises:
        OSError: it cannot be written to.
    """
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tokenflex-doctor-") as file:
        begin = time.perf_counter()
        for _ in range(BLOCK // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - begin
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begin = time.perf_counter()
        while file.read(2**22):
            pass
        return BLOCK / written, BLOCK / (time.perf_counter() - begin)


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _shared_memory() -> Iterator[Finding]:
    place = Path("/dev/shm")
    if not place.is_dir():
        yield Finding(
            "shared memory", FAIL, "no /dev/shm", "loading processes need it: data.num_workers=0 does without"
        )
        return
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    advice = "loading processes hand batches over there: docker run --shm-size=8g, or data.num_workers=0"
    yield _finding("shared memory", WARN, free >= MIN_SHARED, f"{free / 1e9:.1f} GB free", advice)


def _open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"at most {soft} open files" + (f" ({hard} can be set)" if hard != soft else "")
    is_fit = soft == resource.RLIM_INFINITY or soft >= MIN_FILES
    yield _finding("file limit", WARN, is_fit, found, f"many shards and ranks need more: ulimit -n {MIN_FILES}")


def _port(port: int | None) -> Iterator[Finding]:
    if port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            is_free = True
        except OSError:
            is_free = False
    advice = "set MASTER_PORT (deepspeed --master_port, torchrun --master-port) to a free one"
    yield _finding("port", WARN, is_free, f"{port} is {'free' if is_free else 'taken'}", advice)


def _hub(environment: Mapping[str, str]) -> Iterator[Finding]:
    from huggingface_hub import constants

    token = "a token in its file" if Path(constants.HF_TOKEN_PATH).exists() else "no token"
    if any(environment.get(name) for name in HUB_TOKENS):
        token = "a token in the environment"
    offline = any(environment.get(name, "0") not in ("", "0") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    found = f"{token}, {'offline' if offline else 'online'}, cache {constants.HF_HUB_CACHE}"
    if offline and not Path(constants.HF_HUB_CACHE).is_dir():
        yield Finding("hub", WARN, found, "the cache is not there: parts must be folders, or unset HF_HUB_OFFLINE")
    else:
        yield Finding("hub", OK, found)
    if _version("wandb"):
        state = "logs online" if environment.get("WANDB_API_KEY") else "logs into the run's folder: no WANDB_API_KEY"
        yield Finding("wandb", OK, f"{_version('wandb')}, {state}")


def _finding(name: str, otherwise: Literal["warn", "fail"], is_fit: bool, found: str, advice: str) -> Finding:
    return Finding(name, OK, found) if is_fit else Finding(name, otherwise, found, advice)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
