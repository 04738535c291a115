"""Fused kernels of TokenFLEX: ragged adaptive pooling, the pooled SwiGLU projector, and the splice of packed rows.

Usable on their own: ``adaptive_pool``, ``pooled_swiglu`` and ``splice_rows`` run Triton kernels on CUDA tensors and the
plain torch ``reference`` on the CPU. See ../README.md for the derivation, shapes, errors and limits.
"""

from . import reference
from .choose import load_choices, save_choices, set_tuning
from .ops import adaptive_pool, pooled_swiglu, splice_rows, swiglu
from .reference import Linear, Norm
from .target import is_available

__all__ = [
    "Linear",
    "Norm",
    "adaptive_pool",
    "is_available",
    "load_choices",
    "pooled_swiglu",
    "reference",
    "save_choices",
    "set_tuning",
    "splice_rows",
    "swiglu",
]
