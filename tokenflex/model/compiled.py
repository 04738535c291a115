"""torch.compile for the repeated blocks of encoder and language model, once for all lengths of a pack.

Blocks are compiled and not the whole model: all blocks of a kind share what is compiled for one of them. Lengths are symbols in it,
so a pack of another length compiles nothing. Attention stays as it is: it has kernels of its own.
"""

import torch
from transformers import AttentionInterface, PreTrainedModel

from ..errors import UserError
from .attention import PACKED, packed_attention
from .modeling_tokenflex import TokenFlexForConditionalGeneration


def repeated_blocks(part: PreTrainedModel) -> list[torch.nn.Module]:
    """The blocks that a part is a stack of, in order: what transformers does not split over devices, in its lists."""
    names = set(part._no_split_modules or ())
    lists = [module for module in part.modules() if isinstance(module, torch.nn.ModuleList)]
    return [block for blocks in lists for block in blocks if type(block).__name__ in names]


def check_blocks(model: TokenFlexForConditionalGeneration) -> list[torch.nn.Module]:
    """The blocks of both towers, which may lie on the meta device.

    Raises:
        UserError: neither part has any.
    """
    blocks = [block for part in (model.vision_tower, model.language_model) for block in repeated_blocks(part)]
    if not blocks:
        raise UserError(
            "train.compile=blocks: neither part says what its blocks are (`_no_split_modules`); set train.compile=off"
        )
    return blocks


def compile_blocks(model: TokenFlexForConditionalGeneration, backend: str = "inductor") -> int:
    """Compile the blocks of a model in place, at their first use; returns how many there are.

    Raises:
        UserError: neither part has any.
    """
    blocks = check_blocks(model)
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    return len(blocks)
