"""Linear layers of frozen parts in 8 bit: a byte a weight and a scale a row, through which gradients reach what is trained.

Two plain parameters a layer, so whatever holds, sends, saves or counts parameters does so with these. Why none of the libraries' own: decision 20.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..errors import UserError

ROWS, SCALE = ".weight_int8", ".weight_scale"
"""What the names of a weight in 8 bit end with."""


class Int8Linear(torch.nn.Module):
    """A frozen linear layer, x -> x W^T + b, where W is a scale a row times whole numbers from -127 to 127.

    weight_int8: [m, n]. weight_scale: [m], in the number format of the layer that it is made from, `linear`. bias: [m] or None.
    """

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rows, scale = quantize_rows(linear.weight.detach())
        self.weight_int8 = torch.nn.Parameter(rows, requires_grad=False)
        self.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """W [m, n], made anew at each reading: some parts ask a layer for its weight's number format, or multiply by it themselves."""
        return whole_rows(self.weight_int8, self.weight_scale).to(self.weight_scale.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., n] -> [..., m]."""
        outputs = _Product.apply(inputs, self.weight_int8, self.weight_scale)
        return outputs if self.bias is None else outputs + self.bias


class _Product(torch.autograd.Function):
    """x W^T. The backward pass finds the bytes alone: a product written plainly would hold W in the inputs' format until then."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, scale)
        return F.linear(inputs, rows.to(inputs.dtype)) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rows, scale = ctx.saved_tensors
        return (gradients[0] * scale) @ rows.to(gradients[0].dtype), None, None


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(whole numbers [m, n], scale [m]) of a weight [m, n]: its largest entry in each row becomes 127, and none is off by more than half a scale.

    The scale is rounded to the weight's format first and the numbers are made with what is left of it.
    """
    scale = (weight.abs().amax(dim=1).float() / 127).to(weight.dtype)
    scale = scale.masked_fill(scale == 0, 1)
    rows = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return rows.to(torch.int8), scale


def whole_rows(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight [m, n] of what `quantize_rows` gives, in fp32, where 16-bit scales give it exactly."""
    return rows.float() * scale.float()[:, None]


def hold_in_int8(tower: PreTrainedModel, key: str) -> None:
    """Hold the linear layers of a part in 8 bit, but for its output layer and its adapters.

    key: of the recipe, that asks for it.

    Raises:
        UserError: the part has none.
    """
    found = list(_linear_layers(tower))
    if not found:
        raise UserError(f"{key}=int8: {type(tower).__name__} has no linear layer (torch.nn.Linear); set it to same")
    for parent, child, linear in found:
        setattr(parent, child, Int8Linear(linear))


def _linear_layers(tower: PreTrainedModel) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    """(its parent, its name there, the layer) of each; a subclass may use its weight otherwise, and is left alone."""
    output = tower.get_output_embeddings()
    for name, parent in tower.named_modules():
        for child, module in parent.named_children():
            if type(module) is torch.nn.Linear and module is not output and ".lora_" not in f".{name}.{child}":
                yield parent, child, module
