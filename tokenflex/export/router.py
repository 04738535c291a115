"""An exported model with a router: the same weights and files, and the router beside them."""

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import staged_folder, write_whole
from ..model import TokenFlexForConditionalGeneration
from .export import _as_the_umask_says, without_paths

if TYPE_CHECKING:
    from ..model import TokenFlexProcessor

SECTION = "## The count by itself"


def export_router(
    model: TokenFlexForConditionalGeneration,
    processor: "TokenFlexProcessor",
    source: str | os.PathLike,
    target: str | os.PathLike,
) -> None:
    """Write `model`, loaded from the export `source` and given a router, to `target` (which may be `source`), in one rename.

    What else lies in `source`, its card among it, comes along; the card gains a section that says how to use the router.
    """
    source = Path(source)
    with staged_folder(target) as staging, without_paths(model.config, processor.tokenizer):
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        for path in source.iterdir():
            if path.is_file() and not (staging / path.name).exists() and "safetensors" not in path.name:
                shutil.copy(path, staging / path.name)
        _tell(staging / "README.md", model)
        _as_the_umask_says(staging)


def _tell(card, model):
    """The card's section about the router, anew."""
    settings = model.config.router
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    text = re.sub(rf"(?ms)^{SECTION}\n.*?(?=^## |\Z)", "", text)
    counts = ", ".join(map(str, settings["num_visual_tokens"]))
    section = f"""{SECTION}

`model.generate(**inputs, num_visual_tokens="auto", effort=0.5)` lets a router choose among {counts} visual tokens for each image by
the image and the question. Effort goes from 0 (always the fewest) to 1 (always the most); without it {settings["effort"]:g}
is taken, which kept 99 % of the answers' likelihood on training data held out from the router.

"""
    place = text.find("## Data and licence")
    place = len(text) if place < 0 else place
    write_whole(card, text[:place] + section + text[place:])
