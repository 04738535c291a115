"""Key-value caches kept over the turns of conversations, so that a further turn runs what is new through the language model alone.

What two prompts share is told by what the model was given: their tokens, and of each image its pixels or features, its
tiles and the shape of its visual tokens. So another image, another count or a turn that a template writes anew ends what is shared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..model.modeling_tokenflex import image_runs

DRIFTING = ("dynamic", "longrope")
"""Rotary embeddings that change with a prompt's length: keys of a short one do not fit a long one."""
REWRITTEN = 8
"""Tokens at the end of a prompt that a template may leave out once there is an answer, such as an empty thought."""


@dataclass(frozen=True, eq=False)
class _Image:
    """An image of a prompt: its tokens `start` to `end` - 1, and what they are made from."""

    start: int
    end: int
    shape: int | tuple[int, int] | None
    pixels: torch.Tensor
    sizes: torch.Tensor

    def is_like(self, other: "_Image") -> bool:
        return (
            (self.start, self.end, self.shape) == (other.start, other.end, other.shape)
            and torch.equal(self.pixels, other.pixels)
            and torch.equal(self.sizes, other.sizes)
        )


@dataclass(frozen=True, eq=False)
class _Kept:
    """A cache and the tokens that it has, of which the first `num_prompt` were asked."""

    ids: torch.Tensor
    images: list[_Image]
    num_prompt: int
    cache: DynamicCache

    @property
    def num_bytes(self) -> int:
        tensors = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in [*tensors, *(image.pixels for image in self.images)])

    def num_shared(self, ids: torch.Tensor, images: list[_Image]) -> int:
        """How many tokens a prompt begins with that are here too; an image is shared whole or not at all."""
        longest = min(len(ids) - 1, len(self.ids))
        differs = (ids[:longest] != self.ids[:longest]).nonzero()
        same = int(differs[0]) if len(differs) else longest
        for image, other in zip_longest(images, self.images[: len(images)]):
            if image.start < same and (other is None or image.end > same or not image.is_like(other)):
                return image.start
        return same


class Conversations:
    """The caches of the conversations that a model had last, in `max_bytes` together; 0 keeps none.

    There are none either for a language model that keeps a window, or a state in place of keys and values: such a cache cannot go
    back to where two prompts part.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: int):
        self._config = model.config
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        is_plain = all(type(layer) is DynamicLayer for layer in self._fresh().layers)
        can_resume = is_plain and rope.get("rope_type") not in DRIFTING
        self._max_bytes = max_bytes if can_resume else 0
        self._kept: list[_Kept] = []  # the one that was used last at the end

    def resume(self, inputs: Mapping[str, Any]) -> DynamicCache | None:
        """A cache that has what a prompt (`inputs` of one row) begins with, as far as it was run before; None where none are kept.

        The prompt's last token is always left to run.
        """
        if not self._max_bytes:
            return None
        images = _images(inputs, self._config.image_token_id)
        lengths = [kept.num_shared(inputs["input_ids"][0], images) for kept in self._kept]
        cache, longest = self._fresh(), max(lengths, default=0)
        if longest:
            kept = self._kept[lengths.index(longest)]
            for number, layer in enumerate(kept.cache.layers):
                cache.update(layer.keys[..., :longest, :], layer.values[..., :longest, :], number)
            self._kept.remove(kept)
            if longest < kept.num_prompt - REWRITTEN:
                self._kept.append(kept)  # this prompt does not go on with that one, which may be gone on with yet
        return cache

    def keep(self, inputs: Mapping[str, Any], sequence: torch.Tensor, cache: DynamicCache) -> None:
        """Keep the cache of a prompt and its answer, whose tokens are `sequence` [T]; of the others, those that still have room."""
        images, num_prompt = _images(inputs, self._config.image_token_id), inputs["input_ids"].shape[1]
        kept = _Kept(sequence[: cache.get_seq_length()], images, num_prompt, cache)
        is_whole = all(layer.is_initialized for layer in cache.layers)  # layers may use the keys of others
        if is_whole and kept.num_bytes <= self._max_bytes:
            self._kept.append(kept)
        while sum(kept.num_bytes for kept in self._kept) > self._max_bytes:
            self._kept.pop(0)

    def clear(self) -> None:
        """Keep nothing of what was."""
        self._kept.clear()

    def _fresh(self) -> DynamicCache:
        return DynamicCache(config=self._config.get_text_config(decoder=True))


def _images(inputs, image_token_id):
    """The images of a prompt."""
    if "pixel_values" not in inputs:
        return []
    runs, tiles = image_runs(inputs["input_ids"], image_token_id), inputs["num_tiles"].tolist()
    shapes = inputs.get("num_visual_tokens")
    shapes = shapes if isinstance(shapes, list) else [shapes] * len(runs)
    pixels = inputs["pixel_values"].split(tiles)
    sizes = inputs.get("tile_sizes", torch.zeros(sum(tiles))).split(tiles)
    return [_Image(start, start + length, *rest) for (_, start, length), *rest in zip(runs, shapes, pixels, sizes)]
