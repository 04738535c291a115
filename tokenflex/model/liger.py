"""Liger's Triton kernels in the language model: RMSNorm, RoPE and SwiGLU, where they are installed and a GPU runs them."""

import importlib.util

import torch
from transformers.integrations.liger import apply_liger_kernel

from ..errors import UserError

# The loss is the trainer's own (tokenflex/train/loss.py): Liger would replace the model's forward to compute another.
KERNELS = {"rms_norm": True, "rope": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


def apply_liger(language_model, mode):
    """Patch `language_model` with Liger's kernels; returns whether that was done. `mode` is `auto`, `on` or `off`.

    Liger patches the instance's modules and, for RoPE, the model type's own module in transformers: every language model
    of that type in this process then computes its RoPE so. Weights and their names stay.

    Raises:
        UserError: `on`, and Liger is not installed, there is no GPU, or it has no kernels for this model type.
    """
    obstacle = "" if mode == "off" else _obstacle(language_model.config.model_type)
    if mode == "on" and obstacle:
        raise UserError(f"model.liger=on: {obstacle}; or set model.liger=auto, which does without")
    if mode == "off" or obstacle:
        return False
    apply_liger_kernel(language_model, KERNELS)
    return True


def _obstacle(model_type):
    """What keeps Liger's kernels from running, and what to do about it; empty where nothing does."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; pip install liger-kernel"
    if not torch.cuda.is_available():
        return "Liger's kernels need a GPU and torch sees none; run on one"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger has no kernels for language models of type {model_type}; choose another one"
    return ""
