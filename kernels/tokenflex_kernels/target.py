"""What this process can launch: Triton present, a CUDA device it compiles for, or Triton's interpreter."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

OLDEST_CAPABILITY = 80  # bfloat16 matrix units and asynchronous copies
TMA_CAPABILITIES = (9, 10)  # major versions whose kernels read through tensor descriptors
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton's interpreter was switched on (TRITON_INTERPRET=1) when the kernels were imported."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def is_available() -> bool:
    """Whether the kernels run on this process's current CUDA device: Triton, NVIDIA, compute capability 8.0 or newer."""
    return _has_cuda() and capability(torch.device("cuda", torch.cuda.current_device())) >= OLDEST_CAPABILITY


@functools.cache
def _has_cuda() -> bool:
    return has_triton() and torch.version.cuda is not None and torch.cuda.is_available()


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; the interpreter counts as 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def device_name(device: torch.device) -> str:
    """What tables of choices call ``device``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``; 2 under the interpreter, so that a persistent loop loops."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def runs_kernels(tensor: Tensor) -> bool:
    """Whether the Triton kernels serve ``tensor``; otherwise, and where it is empty, the reference does."""
    if tensor.dtype not in KERNEL_DTYPES or tensor.numel() == 0:
        return False
    if tensor.is_cuda:
        return _has_cuda() and capability(tensor.device) >= OLDEST_CAPABILITY
    return tensor.device.type == "cpu" and is_interpreted()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own is wrapped for its compiler, and costs a launch several microseconds."""
    return -(-a // b)
