"""The token-adaptive projector: pool -> LayerNorm -> SwiGLU of inner width 3C -> language model width (paper section 3.1)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .pooling import adaptive_pool, sides_of

try:  # the fused kernels are optional: without them, and on CPU, the plain torch statement below runs
    import tokenflex_kernels
except ImportError:
    tokenflex_kernels = None


class TokenAdaptiveProjector(nn.Module):
    """Patch features of any grid -> any number of visual tokens in the language model's width.

    `forward(features_PC, grids, sides)`: features [sum(H_i W_i), C] of images laid one after another, `grids` a list of
    (H, W), `sides` a list of (n_h, n_w) -> [sum(n_h n_w), D]. The fused kernels take a `plan` instead, where there is one
    (`plan_maker`). Gate and up projection share one weight [2 * 3C, C] (gate
    rows first), so they run as one GEMM and shard as one parameter.

    With `detail="max"` each channel of a pooled patch is its window's average plus a learned share of what the window's
    largest value has over it: what averaging blurs is there from the first step on, and counts for nothing until the share,
    zero at the start, has been learned.

    `backend` is `auto` (fused kernels on GPU where installed), `kernels` (their operators on any device; on CPU these run
    plain torch) or `reference` (the statement below, everywhere).
    """

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        multiplier: int = 3,
        mode: str = "adaptive",
        backend: str = "auto",
        detail: str = "none",
    ):
        super().__init__()
        inner = multiplier * vision_width
        self.mode = mode
        self.backend = backend
        self.norm = nn.LayerNorm(vision_width)
        self.gate_up = nn.Linear(vision_width, 2 * inner)
        self.down = nn.Linear(inner, text_width)
        self.detail_share = nn.Parameter(torch.zeros(vision_width)) if detail == "max" else None

    def forward(
        self,
        features_PC: torch.Tensor,
        grids: list[tuple[int, int]],
        sides: list[tuple[int, int]] | None,
        plan: object | None = None,
    ) -> torch.Tensor:
        kernels = self.kernels_for(features_PC)
        if kernels is not None:
            if plan is None:
                plan = kernels.pool_plan(grids, sides, self.mode, features_PC.device)
            norm = kernels.Norm(self.norm.weight, self.norm.bias, self.norm.eps)
            gate_up, down = (kernels.Linear(x.weight, x.bias) for x in (self.gate_up, self.down))
            if self.detail_share is not None:
                pooled_NC = self._with_detail(features_PC, kernels.adaptive_pool(features_PC, plan), grids, sides)
                return kernels.swiglu(pooled_NC, norm, gate_up, down)
            return kernels.pooled_swiglu(features_PC, plan, norm, gate_up, down)
        pooled_NC = adaptive_pool(features_PC, grids, sides, self.mode)
        if self.detail_share is not None:
            pooled_NC = self._with_detail(features_PC, pooled_NC, grids, sides)
        gate_NH, up_NH = self.gate_up(self.norm(pooled_NC)).chunk(2, dim=-1)
        return self.down(F.silu(gate_NH) * up_NH)

    def _with_detail(self, features_PC, pooled_NC, grids, sides):
        peaks_NC = adaptive_pool(features_PC, grids, sides, "max")
        return pooled_NC + self.detail_share.to(pooled_NC.dtype) * (peaks_NC - pooled_NC)

    def plan_maker(self, grid: Sequence[int], tensor: torch.Tensor) -> Callable[[list[Any]], Any] | None:
        """`counts -> plan`, counts also as (rows, columns), for tiles of `grid`, to be called where a batch is collated, also in another process.

        None where `tensor` (any of the device that computes) does not go through the kernels.
        """
        if self.kernels_for(tensor) is None:
            return None
        return functools.partial(_plan_of, grid=tuple(grid), mode=self.mode)

    def kernels_for(self, tensor: torch.Tensor) -> Any:
        """The kernels' package where `backend` says that `tensor` goes through it, else None.

        Raises:
            ImportError: the backend is `kernels`, and the package is not installed.
        """
        if self.backend == "auto":
            is_usable = tensor.is_cuda and tokenflex_kernels is not None and tokenflex_kernels.is_available()
            return tokenflex_kernels if is_usable else None
        if self.backend == "kernels" and tokenflex_kernels is None:
            raise ImportError(
                "the projector's backend is 'kernels', but tokenflex_kernels is not installed; install it, or set 'auto'"
            )
        return tokenflex_kernels if self.backend == "kernels" else None

    def reset_parameters(self) -> None:
        """Start anew as the constructor does: torch's own start of linear layers, LayerNorm the identity."""
        for layer in (self.norm, self.gate_up, self.down):
            layer.reset_parameters()
        if self.detail_share is not None:
            nn.init.zeros_(self.detail_share)


def _plan_of(counts, grid, mode):
    """The kernels' plan of one tile per count, on the CPU."""
    return tokenflex_kernels.pool_plan([grid] * len(counts), [sides_of(count, grid) for count in counts], mode)
