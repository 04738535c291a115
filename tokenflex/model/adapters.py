"""Low-rank adapters (LoRA, arXiv 2106.09685) on the parts of the model, through peft: put in, merged out, or kept apart.

Within the model a layer `x` that has one becomes `x.base_layer` (frozen) beside `x.lora_A.default` and `x.lora_B.default`;
checkpoints have these names. What is exported has the plain ones.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from ..errors import UserError
from .int8 import ROWS, SCALE, whole_rows
from .modeling_tokenflex import TokenFlexForConditionalGeneration

if TYPE_CHECKING:
    from ..config import AdapterConfig, ModelConfig

MODULES = {"vision": "vision_tower", "text": "language_model"}
"""Part of the configuration that may have an adapter -> its module."""
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def adapters(model: "ModelConfig") -> dict[str, "AdapterConfig"]:
    """{part: its adapter} of the parts that have one."""
    found = {part: getattr(model, f"{part}_adapter") for part in MODULES}
    return {part: adapter for part, adapter in found.items() if adapter.rank}


def check_adapters(model: "ModelConfig") -> None:
    """See that adapters can be had here, before weights are loaded.

    Raises:
        UserError: peft is not installed.
    """
    if adapters(model):
        _peft(next(iter(adapters(model))))


def add_adapters(built: TokenFlexForConditionalGeneration, model: "ModelConfig") -> None:
    """Put the adapters that a configuration asks for into a model; at first they change nothing.

    Raises:
        UserError: a part has no linear layer of the names that were given.
    """
    for part, adapter in adapters(model).items():
        peft = _peft(part)
        targets = "all-linear" if adapter.layers == ("all-linear",) else list(adapter.layers)
        config = peft.LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, target_modules=targets
        )
        tower = getattr(built, MODULES[part])
        key = f"model.{part}_adapter"
        try:
            peft.inject_adapter_in_model(config, tower)
        except ValueError as error:
            raise UserError(
                f"{key}: {' '.join(str(error).split())[:200]}; name linear layers in {key}.layers"
            ) from None
        for name, module in tower.named_modules():
            if name.endswith(".base_layer") and not isinstance(module, torch.nn.Linear):
                layer = name.removesuffix(".base_layer")
                raise UserError(f"{key}: {layer} is a {type(module).__name__}; name linear layers in {key}.layers")


def merged(state: Mapping[str, torch.Tensor], model: "ModelConfig") -> dict[str, torch.Tensor]:
    """Whole weights by their plain names: W + (alpha / rank) B A where there is an adapter, W of its rows where it is in 8 bit.

    In fp32, rounded once.
    """
    scales = {f"{MODULES[part]}.": adapter.alpha / adapter.rank for part, adapter in adapters(model).items()}
    plain = {name.replace(BASE, "."): tensor for name, tensor in state.items() if DOWN not in name and UP not in name}
    downs = {name.replace(DOWN, "."): name for name in state if DOWN in name}
    in_int8 = [name.removesuffix(ROWS) + ".weight" for name in plain if name.endswith(ROWS)]
    for target in dict.fromkeys([*in_int8, *downs]):
        weight, dtype = _plain_weight(plain, target)
        if target in downs:
            (scale,) = (scale for prefix, scale in scales.items() if target.startswith(prefix))
            down, up = state[downs[target]], state[downs[target].replace(DOWN, UP)]
            weight = weight + scale * (up.float() @ down.float())
        plain[target] = weight.to(dtype)
    return plain


def _plain_weight(plain, target):
    """(a weight in fp32, the format that it is to have); what it had in 8 bit is taken out of `plain`."""
    if target in plain:
        return plain[target].float(), plain[target].dtype
    layer = target.removesuffix(".weight")
    rows, scale = plain.pop(layer + ROWS), plain.pop(layer + SCALE)
    return whole_rows(rows, scale), scale.dtype


def save_adapters(
    state: Mapping[str, torch.Tensor], model: "ModelConfig", trained: list[str], folder: str | os.PathLike
) -> None:
    """Write the adapters of whole weights `state` as a folder that peft loads onto the model of `model.init_from`.

    `trained`: names of modules without an adapter that were trained (the projector, say), which go along whole.
    """
    chosen = adapters(model)
    peft = _peft(next(iter(chosen)))
    names = sorted(name.partition(DOWN)[0] for name in state if DOWN in name)
    of = {name: next(a for part, a in chosen.items() if name.startswith(MODULES[part])) for name in names}
    config = peft.LoraConfig(
        base_model_name_or_path=model.init_from,
        target_modules=names,
        r=of[names[0]].rank,
        lora_alpha=of[names[0]].alpha,
        rank_pattern={name: adapter.rank for name, adapter in of.items()},
        alpha_pattern={name: adapter.alpha for name, adapter in of.items()},
        modules_to_save=trained or None,
        inference_mode=True,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {n: t for n, t in state.items() if DOWN in n or UP in n or n.startswith(tuple(f"{m}." for m in trained))}
    plain = {f"base_model.model.{name.replace('.default.', '.')}": tensor.contiguous() for name, tensor in kept.items()}
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = names  # a set to peft, whose order would be another every time
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))


def _peft(part):
    try:
        import peft
    except ImportError:
        raise UserError(
            f"model.{part}_adapter: needs peft, which is not installed; pip install 'tokenflex[lora]'"
        ) from None
    return peft
