"""The projector as a module."""

from __future__ import annotations

from torch import Tensor, nn

from .geometry import PoolPlan
from .ops import pooled_swiglu
from .reference import Linear, Norm


class PooledSwiGLU(nn.Module):
    """Pool, LayerNorm, SwiGLU, down: ``forward(features [sum(H*W), C], plan) -> [sum(n_h*n_w), D]``.

    Its parameters are those of ``norm`` (LayerNorm of C), ``gate_up`` (C -> 2H, the gate's rows first) and ``down`` (H ->
    D), for a state dict or ZeRO-3 like any other module's. Errors as ``pooled_swiglu``.
    """

    def __init__(
        self, width: int, inner: int, out: int, *, bias: bool = True, eps: float = 1e-5, recompute: bool = False
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.gate_up = nn.Linear(width, 2 * inner, bias=bias)
        self.down = nn.Linear(inner, out, bias=bias)
        self.recompute = recompute

    def forward(self, features: Tensor, plan: PoolPlan) -> Tensor:
        norm = Norm(self.norm.weight, self.norm.bias, self.norm.eps)
        gate_up, down = (Linear(x.weight, x.bias) for x in (self.gate_up, self.down))
        return pooled_swiglu(features, plan, norm, gate_up, down, recompute=self.recompute)

    def extra_repr(self) -> str:
        return f"recompute={self.recompute}"
