"""Fused kernels of TokenFLEX: ragged adaptive pooling, the pooled SwiGLU projector, and the splice of packed rows.

Usable on their own: ``adaptive_pool``, ``pooled_swiglu`` and ``splice_rows`` run Triton kernels on CUDA tensors and
plain torch on the CPU. See ../README.md for the derivation, shapes, errors and limits.
"""

from . import reference
from .choose import export_choices, import_choices, set_one_launch, set_tuning
from .geometry import PoolPlan, pool_plan
from .module import PooledSwiGLU
from .ops import adaptive_pool, pooled_swiglu, splice_rows, swiglu
from .reference import Linear, Norm
from .target import is_available
from .warm import warm_up

__all__ = [
    "Linear",
    "Norm",
    "PoolPlan",
    "PooledSwiGLU",
    "adaptive_pool",
    "export_choices",
    "import_choices",
    "is_available",
    "pool_plan",
    "pooled_swiglu",
    "reference",
    "set_one_launch",
    "set_tuning",
    "splice_rows",
    "swiglu",
    "warm_up",
]
