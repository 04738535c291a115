"""The model card of an export: how to load it, what it is made of, and fields that only its maker can fill in."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..model import TokenFlexConfig

NOT_EVALUATED = "Not evaluated."
CODE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER", dtype="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("THIS_FOLDER", trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "image", "path": "page.png"}, {"type": "text", "text": "What is it?"}]}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
output = model.generate(**inputs, num_visual_tokens=COUNT, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def model_card(config: "TokenFlexConfig", known: Mapping[str, str]) -> str:
    """README.md of an exported model.

    Args:
        config: the model's; what came from a folder of this machine is named by its type alone.
        known: `name`, `license`, `data` (names of the training data) and `figures` (a table), each where it is known.
    """
    counts = ", ".join(map(str, config.trained_num_visual_tokens))
    parts = [_named(part) for part in (config.vision_config, config.text_config)]
    base = [part.name_or_path for part in (config.vision_config, config.text_config) if is_hub_id(part.name_or_path)]
    front = ["library_name: transformers", "pipeline_tag: image-text-to-text", "tags: [tokenflex]"]
    front += [f"base_model: [{', '.join(base)}]"] if base else []
    front += [f"license: {known.get('license', 'unknown')}"]
    return f"""---
{chr(10).join(front)}
---

# {known.get("name", "A TokenFLEX model")}

A vision-language model that answers at any number of visual tokens per image.

- Visual tokens seen in training: {counts} (others work; measure them on your task)
- Image size: {config.image_height} x {config.image_width} pixels, or tiles of that size
- Vision encoder: {parts[0]}
- Language model: {parts[1]}

## Use

{CODE.replace("COUNT", str(config.default_num_visual_tokens))}

## Data and licence

Training data: {known.get("data", "not stated; name it here")}.
Licence: {known.get("license", "not stated; that of the parts and of the data bounds it")}.

## Figures

{known.get("figures", NOT_EVALUATED)}
"""


def add_figures(folder: str | os.PathLike, figures: str) -> None:
    """Put figures (Markdown) into the card of an exported model, where it says that there are none."""
    card = Path(folder) / "README.md"
    if card.exists():
        write_whole(card, card.read_text(encoding="utf-8").replace(NOT_EVALUATED, figures))


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is an owner and a repository, and no path of this machine."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name or "")) and not Path(name).exists()  # type: ignore[arg-type]  # None is no match


def _named(part: "PreTrainedConfig") -> str:
    return f"`{part.name_or_path}` ({part.model_type})" if is_hub_id(part.name_or_path) else part.model_type
