"""A checkpoint as a model folder, on one machine and without the job that wrote it."""

import os
from pathlib import Path

import torch

from ..checkpoint import Damaged, Manifest, checked_and_repaired, read_whole, tags
from ..config import RunConfig
from ..corpus import resolve_embedded
from ..errors import UserError
from ..layout import MANIFEST, RunLayout
from ..model import TokenFlexForConditionalGeneration, build_processor
from ..model.adapters import merged
from ..model.configuration_tokenflex import TokenFlexConfig
from ..model.generation import generation_settings
from .export import export_model


def export_checkpoint(folder: str | os.PathLike, target: str | os.PathLike, is_average: bool = False) -> Manifest:
    """Write the model of a checkpoint (of any number of ranks) to `target`, after checking every byte of it.

    `folder` is a checkpoint, or a run's folder, whose newest one is taken. Weights have the number format that they were
    trained in, adapters are merged. is_average: the average of the trained weights instead. Returns the manifest.

    Raises:
        UserError: no checkpoint there, it is damaged, it has no average, or its tokenizer cannot be loaded any more.
    """
    folder = checkpoint_folder(folder)
    try:
        manifest, _ = checked_and_repaired(folder)
        state = read_whole(folder, manifest)
        average = read_whole(folder, manifest, "average") if is_average else {}
    except Damaged as damage:
        raise UserError(
            f"checkpoint {folder}: {damage}; export an older one, see: tokenflex checkpoint verify"
        ) from None
    if is_average and not average:
        raise UserError(f"checkpoint {folder}: has no average of the weights; train with train.ema_decay=0.999, say")
    state |= average
    config = resolve_embedded(RunConfig.model_validate(manifest.config), with_data=False)
    processor = build_processor(config.model, config.budget)
    with torch.device("meta"):
        model = TokenFlexForConditionalGeneration(TokenFlexConfig.from_dict(manifest.model))
    model.generation_config = generation_settings(config.model, processor)
    export_model(model, merged(state, config.model), processor, target)
    return manifest


def checkpoint_folder(folder: str | os.PathLike) -> Path:
    """`folder` if it is a checkpoint, else the newest one of the run (or folder of checkpoints) it names.

    Raises:
        UserError: neither.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        return folder
    for place in (RunLayout(folder).checkpoints, folder):
        if tags(place):
            return place / tags(place)[-1]
    raise UserError(f"{folder}: no checkpoint there; give a run's folder (runs/NAME) or one of its checkpoints/step-*")
