"""Write a model folder: weights as safetensors, configuration, processor, and the code that they need."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..files import staged_folder
from ..model import TokenFlexForConditionalGeneration
from .card import is_hub_id, model_card

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.processor import Processor
    from ..model import TokenFlexConfig

AUTO_MAP = {
    "AutoModel": "modeling_tokenflex.TokenFlexModel",
    "AutoModelForMultimodalLM": "modeling_tokenflex.TokenFlexForConditionalGeneration",
}
"""Which classes of the exported code the Auto classes load, beside those that transformers enters by itself."""


def loading_code(folder: str | os.PathLike) -> str:
    """The lines of Python that load an exported model, for a person to copy."""
    return (
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    )


def export_model(
    model: TokenFlexForConditionalGeneration,
    state: Mapping[str, torch.Tensor],
    processor: "Processor",
    folder: str | os.PathLike,
    card: Mapping[str, str] | None = None,
) -> None:
    """Write the model of `state` (full weights by name) and its processor to `folder`, replacing what was there.

    `model` gives configuration and generation settings only; its own weights may be sharded. `card` has what the model card
    tells beside the model itself (see `model_card`). The folder appears in one rename, so a reader never sees half of it;
    the umask decides who may read it, and no path of this machine is in it.

    Raises:
        UserError: `state` holds weights that are none of the model's, or lacks some; the message names them.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    with torch.device("meta"):
        full = TokenFlexForConditionalGeneration(config)
    _load_whole(full, state)
    full.generation_config = model.generation_config
    full.config.dtype = dtype
    full.config.auto_map = dict(AUTO_MAP)
    with staged_folder(folder) as staging, without_paths(full.config, processor.tokenizer):
        full.save_pretrained(staging)
        processor.save_pretrained(staging)  # type: ignore[attr-defined]  # the model's own has it
        (staging / "README.md").write_text(model_card(full.config, card or {}), encoding="utf-8")
        _as_the_umask_says(staging)


def _load_whole(full: TokenFlexForConditionalGeneration, state: Mapping[str, torch.Tensor]) -> None:
    """Every weight of `state` into `full`, and every weight of `full` from `state`.

    Raises:
        UserError: they are not the same weights.
    """
    known = {name for name, _ in [*full.named_parameters(remove_duplicate=False), *full.named_buffers()]}
    unknown = sorted(set(state) - known)
    if unknown:
        raise UserError(
            f"export: {len(unknown)} tensors are none of the model's and would be lost, first {unknown[0]}; merge adapters and averages into the model's own weights, or leave them out"
        )
    full.load_state_dict(state, strict=False, assign=True)
    full.tie_weights()
    left = [name for name, parameter in full.named_parameters() if parameter.is_meta]
    if left:
        raise UserError(f"export: {len(left)} weights of the model did not come, first {left[0]}; is the state whole?")


def _as_the_umask_says(folder: Path) -> None:
    """Files that a library writes through a private temporary one stay private: give all the mode of a file written plainly."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextlib.contextmanager
def without_paths(config: "TokenFlexConfig", tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Within this context nothing says where on this machine the parts came from; a hub id is no such thing and stays."""
    owners = [config, config.vision_config, config.text_config, tokenizer]
    names = [owner.name_or_path for owner in owners]
    for owner, name in zip(owners, names):
        if not is_hub_id(name):
            owner.name_or_path = ""
    try:
        yield
    finally:
        for owner, name in zip(owners, names):
            owner.name_or_path = name


def is_exported(folder: str | os.PathLike) -> bool:
    """Whether `folder` holds an exported model."""
    return (Path(folder) / "config.json").exists()
