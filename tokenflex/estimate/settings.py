"""What `simulate` needs of a recipe, put together: its model's shapes, its samples, and what compute and network give."""

import json
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from ..errors import UserError
from ..model.build import shaped_model
from ..parallel import zero_stage
from ..plan import Lengths
from ..train.optimizer import parameter_groups
from .gpus import Gpu
from .memory import ModelSizes
from .network import Network
from .scaling import Costs, Setting, Traffic
from .trace import unit_costs
from .workload import indexed_sources

NUM_GATHERED_BY_LAYER = 1
"""Collectives of stage 3 per layer and pass: DeepSpeed gathers what a layer needs in one."""


def setting_of(
    config: RunConfig, ds_config: Mapping[str, Any], network: Network, gpu: Gpu, mfu: float, costs: Costs | None = None
) -> Setting:
    """The `Setting` of a recipe on GPUs that reach `mfu` while they compute, or at measured `costs`.

    Raises:
        UserError: a part whose configuration is not at hand.
    """
    model = shaped_model(config.model, config.budget, torch.bfloat16)
    parameter_groups(model, config.optimizer)
    units = unit_costs(model)
    stage, sizes = zero_stage(dict(ds_config)), ModelSizes.of(model, ds_config)
    text, vision = model.config.text_config, model.config.vision_config
    layers = getattr(text, "num_hidden_layers", 1) + getattr(vision, "num_hidden_layers", 1)
    return Setting(
        costs=costs or Costs.of_gpu(units, gpu, mfu, config.model.gradient_checkpointing),
        units=units,
        traffic=Traffic.of(sizes, ds_config, stage, layers * NUM_GATHERED_BY_LAYER),
        network=network,
        stage=stage,
        num_workers=config.data.num_workers,
        packs_per_micro_batch=config.data.packs_per_micro_batch,
        flops=gpu.flops,
    )


def samples_of(config: RunConfig, lengths: Lengths | None) -> list[Lengths]:
    """The samples to plan: those given, else the recipe's own where they are indexed.

    Raises:
        UserError: there are none.
    """
    found = [lengths] if lengths is not None else [source.index for source in indexed_sources(config.data)]
    if not found:
        raise UserError(
            "simulate: the recipe's shards have no index here, and a plan needs lengths; name them with --index DIR or --lengths FILE.npz"
        )
    return found


def load_costs(path: str | PathLike) -> Costs:
    """Measured `Costs` from a JSON file, by name; what is left out is 0, but for decoding.

    Raises:
        UserError: no such file, no JSON object, or figures that are not known.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--costs {path}: cannot be read: {error}") from None
    names = [field.name for field in fields(Costs)]
    needed = ("tile", "visual_token", "token", "pair", "learned_token")
    wrong = sorted(set(values) ^ set(needed) if isinstance(values, dict) else needed)
    wrong = [name for name in wrong if name in needed or name not in names]
    if wrong:
        raise UserError(
            f"--costs {path}: {', '.join(wrong)} missing or not known; wanted {', '.join(names)} in seconds"
        )
    return Costs(**{name: float(value) for name, value in values.items()})
