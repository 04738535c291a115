"""The back end of kernels, as reference.py is that of plain torch: the functions that mlp.py and ops.py ask for."""

from .frozen import weight_grads
from .fused import pooled_gated
from .gated import dgated, gated
from .pool import affine, norm_grad, pooled
from .splice import splice as splice_rows
from .splice import splice_backward

__all__ = [
    "affine",
    "dgated",
    "gated",
    "norm_grad",
    "pooled",
    "pooled_gated",
    "splice_backward",
    "splice_rows",
    "weight_grads",
]
