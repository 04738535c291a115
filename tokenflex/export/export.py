"""Write a model folder: weights as safetensors, configuration, processor, and the code that they need."""

import shutil
from pathlib import Path

import torch

from ..model import TokenFlexForConditionalGeneration


def loading_code(folder):
    """The lines of Python that load an exported model, for a person to copy."""
    return (
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    )


def export_model(model, state, processor, folder):
    """Write the model of `state` (full weights by name) and its processor to `folder`, replacing what was there.

    `model` gives configuration and generation settings only; its own weights may be sharded. The folder appears in one
    rename, so a reader never sees half of it.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    config = type(model.config).from_dict(model.config.to_dict())
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    with torch.device("meta"):
        full = TokenFlexForConditionalGeneration(config)
    full.load_state_dict(state, strict=False, assign=True)
    full.tie_weights()
    left = [name for name, parameter in full.named_parameters() if parameter.is_meta]
    assert not left, f"the exported state lacks weights: {left[:3]}"
    full.generation_config = model.generation_config
    full.config.dtype = dtype
    full.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def is_exported(folder):
    """Whether `folder` holds an exported model."""
    return (Path(folder) / "config.json").exists()
