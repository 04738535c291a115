"""The back end of kernels, as reference.py is that of plain torch: the functions that mlp.py asks for."""

from .frozen import weight_grads
from .fused import pooled_gated
from .gated import dgated, gated
from .pool import affine, norm_grad, pooled

__all__ = ["affine", "dgated", "gated", "norm_grad", "pooled", "pooled_gated", "weight_grads"]
