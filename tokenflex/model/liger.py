"""Liger's Triton kernels in the language model: RMSNorm, RoPE and SwiGLU, where they are installed and a GPU runs them."""

import importlib.util
import sys

import torch
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from ..errors import UserError

# The loss is the trainer's own (tokenflex/train/loss.py): Liger would replace the model's forward to compute another.
KERNELS = {"rms_norm": True, "rope": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


def apply_liger(language_model: PreTrainedModel, mode: str) -> bool:
    """Patch `language_model` with Liger's kernels; returns whether that was done. `mode` is `auto`, `on` or `off`.

    RoPE is a function of the model type's module in transformers: every language model of that type in this process then
    computes it so. Everything else is patched in this instance alone. Weights and their names stay.

    Raises:
        UserError: `on`, and Liger is not installed, there is no GPU, or it has no kernels for this model type.
    """
    obstacle = "" if mode == "off" else _obstacle(language_model.config.model_type)
    if mode == "on" and obstacle:
        raise UserError(f"model.liger=on: {obstacle}; or set model.liger=auto, which does without")
    if mode == "off" or obstacle:
        return False
    modeling = sys.modules[type(language_model).__module__]
    classes = {name: value for name, value in vars(modeling).items() if isinstance(value, type)}
    # Liger's MLP is SiLU whatever the model's activation is.
    is_silu = getattr(language_model.config, "hidden_act", "silu") in ("silu", "swish")
    apply_liger_kernel(language_model, {**KERNELS, "swiglu": is_silu})
    # Liger replaces the classes too, for models built later; its MLP has no biases, and an export would lose them.
    for name, value in classes.items():
        setattr(modeling, name, value)
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
