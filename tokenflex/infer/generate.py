"""Load an exported model once and ask it about images, each at its own number of visual tokens."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BatchFeature

from ..config import DataConfig
from ..data import Limits, decode_image
from ..errors import UserError
from ..export import is_exported
from ..model.generation import greedy
from ..model.modeling_tokenflex import CACHE
from ..model.router import AUTO, asks_auto
from .conversations import Conversations

ROUTER = "router"
"""A total shared by the router."""
Count = int | tuple[int, int] | str
"""Visual tokens of an image: a number, (rows, columns), or "auto" for what the model's router chooses."""


class Generator:
    """`generator(prompt, images, num_visual_tokens)` -> answer. Runs on the GPU where there is one.

    An image that was asked about before is not encoded again, whatever the count: the features of the `cached_images` used
    last are kept, by the bytes of their files, or of a frame's pixels. With `cache_bytes`, what a prompt shares with an earlier one is not run through the
    language model again either: `Conversations` keeps as much of them.

    Raises:
        UserError: the folder holds no exported model.
    """

    def __init__(self, folder: str | PathLike, cached_images: int = 16, *, cache_bytes: int = 0):
        if not is_exported(folder):
            raise UserError(
                f"--model {folder}: no exported model there (no config.json); give the folder that training wrote, runs/NAME/model"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").to(device).eval()
        self.model.generation_config = greedy(self.model.generation_config)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.cached_images = cached_images
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._conversations = Conversations(self.model, cache_bytes)

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer together that the language model takes."""
        return getattr(self.model.config.text_config, "max_position_embeddings", None) or 2**31

    def check_room(self, num_tokens: int, where: str) -> None:
        """See that a prompt of as many tokens leaves room for an answer; `where` says what made it so long.

        Raises:
            UserError: it leaves none.
        """
        if num_tokens >= self.context:
            raise UserError(
                f"{where}: a prompt of {num_tokens} tokens, images included, where the model takes {self.context} with the answer; "
                "give fewer visual tokens, or less text"
            )

    def __call__(
        self,
        prompt: str,
        images: Sequence[str | PathLike] = (),
        num_visual_tokens: Count | Sequence[Count] | None = None,
        max_new_tokens: int = 64,
        effort: float | None = None,
        *,
        total_visual_tokens: int | None = None,
        share: str | None = None,
        videos: Sequence[str | PathLike] = (),
    ) -> str:
        """The answer to `prompt` about `images` and `videos` (paths), at `num_visual_tokens` (one for all or one per image or frame).

        `effort` in [0, 1] is for "auto"; by default what training the router found enough. `total_visual_tokens` is what all images
        have together at most, shared `even`ly, by `size`, or by the `router`.

        Raises:
            UserError: an image or a video that cannot be read, a count or total that does not fit, a prompt that the model's context
                does not hold, or "auto" where the model has no router.
        """
        content = [{"type": "image", "image": _read_image(path)} for path in images]
        for path in videos:
            content += [{"type": "image", "image": frame} for frame in self._frames(path)]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
        for entry in num_visual_tokens if isinstance(num_visual_tokens, list) else [num_visual_tokens]:
            count = math.prod(entry) if isinstance(entry, tuple) else entry
            if isinstance(count, int) and content:  # before a prompt of as many placeholders is made
                self.check_room(count, "--num-visual-tokens")
        inputs = self.inputs(messages, num_visual_tokens, effort, total_visual_tokens, share)
        length = inputs["input_ids"].shape[1]
        self.check_room(length, "--prompt")
        num_new = min(max_new_tokens, self.context - length)
        answer, _ = self.generate(inputs, max_new_tokens=num_new, do_sample=False)
        return self.processor.decode(answer, skip_special_tokens=True).strip()

    def generate(self, inputs: BatchFeature, **options: Any) -> tuple[torch.Tensor, int]:
        """The tokens [T] that answer what `inputs` made, and how many of the prompt's were not run again; `options` are transformers'."""
        cache = self._conversations.resume(inputs)
        num_cached = 0 if cache is None else cache.get_seq_length()
        resumed = {} if cache is None else {CACHE: cache}
        try:
            (sequence,) = self.model.generate(**inputs, **resumed, **options)
        except torch.OutOfMemoryError:  # what is kept must not stand in the way of the next
            self._conversations.clear()
            raise
        if cache is not None:
            self._conversations.keep(inputs, sequence, cache)
        return sequence[inputs["input_ids"].shape[1] :], num_cached

    def _frames(self, path: str | PathLike) -> list[Any]:
        try:
            return list(self.processor.frames(Path(path)))
        except OSError as error:
            raise UserError(f"--video {path}: {error.strerror}; give the path of a video file") from None
        except ValueError as error:
            raise UserError(f"--video {path}: {error}") from None

    def inputs(
        self,
        messages: list[dict[str, Any]],
        num_visual_tokens: Count | Sequence[Count] | None = None,
        effort: float | None = None,
        total_visual_tokens: int | None = None,
        share: str | None = None,
    ) -> BatchFeature:
        """Inputs of the model, on its device, for a conversation that it shall go on with; images as the processor takes them.

        Where all images are encoded bytes or arrays, `pixel_values` are their features, of which those used last are kept. "auto"
        has become numbers in them. `total_visual_tokens` and `share` as in a call.

        Raises:
            UserError: a count or total that does not fit, a conversation that the chat template does not take, or "auto" where the model
                has no router.
        """
        if share == ROUTER:
            if num_visual_tokens not in (None, AUTO) or total_visual_tokens is None:
                raise UserError(
                    "--share router: the router shares a total among all images; give --total-visual-tokens, and no counts"
                )
            num_visual_tokens, share = AUTO, None
        if not asks_auto(num_visual_tokens):
            if effort is not None:
                raise UserError(f"--effort {effort:g} is for --num-visual-tokens auto; leave it out, or ask for auto")
            return self._rendered(messages, num_visual_tokens, None, total_visual_tokens, share)
        if share is not None:
            raise UserError(
                f"--share {share} with --num-visual-tokens auto: the router shares the total then; leave it out"
            )
        inputs = self._rendered(messages, None, total_visual_tokens=0)  # any count does; the router shares the total
        seen = {name: inputs.get(name) for name in ("input_ids", "pixel_values", "attention_mask", "num_tiles")}
        try:
            chosen = self.model.resolve_auto(
                num_visual_tokens, **seen, effort=effort, total_visual_tokens=total_visual_tokens or None
            )
        except ValueError as error:
            raise UserError(f"--num-visual-tokens auto: {error}") from None
        return self._rendered(messages, chosen, inputs.get("pixel_values"))

    def _rendered(
        self,
        messages: list[dict[str, Any]],
        num_visual_tokens: Count | Sequence[Count] | None,
        features: torch.Tensor | None = None,
        total_visual_tokens: int | None = None,
        share: str | None = None,
    ) -> BatchFeature:
        """Inputs at counts that are numbers; `features` are those of the images, if they are there."""
        try:
            inputs = self.processor.apply_chat_template(
                messages,
                tokenize=True,
                add_generation_prompt=True,
                num_visual_tokens=num_visual_tokens,
                total_visual_tokens=total_visual_tokens,
                share=share,
            ).to(self.model.device)
        except ValueError as error:
            raise UserError(f"--num-visual-tokens: {error}") from None
        counts = num_visual_tokens if isinstance(num_visual_tokens, list) else [num_visual_tokens]
        if "pixel_values" in inputs and any(isinstance(count, tuple) for count in counts):
            inputs["num_visual_tokens"] = num_visual_tokens  # the prompt tells their number, not their rows and columns
        contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
        items = [item for content in contents for item in content if item["type"] != "text"]
        images = [item.get("image") for item in items]  # of a video none is named, and nothing is kept
        if features is not None:
            inputs["pixel_values"] = features
        elif images and all(map(_is_keyed, images)):
            inputs["pixel_values"] = self._encoded(images, inputs["pixel_values"], inputs.get("num_tiles"))
        return inputs

    @torch.no_grad()
    def _encoded(
        self, images: Sequence[bytes | np.ndarray], pixel_values: torch.Tensor, num_tiles: Sequence[int] | None
    ) -> torch.Tensor:
        """The features of images, those of all their tiles together: [tiles, patches, C]."""
        tiles = [1] * len(images) if num_tiles is None else [int(number) for number in num_tiles]
        keys = [_key(image) for image in images]
        found = {key: self._features[key] for key in keys if key in self._features}
        parts = dict(zip(keys, pixel_values.split(tiles)))
        missing = [key for key in parts if key not in found]
        if missing:
            features = self.model.encode_images(torch.cat([parts[key] for key in missing]))
            found.update(zip(missing, features.split([len(parts[key]) for key in missing])))
        for key in keys:
            self._features[key] = found[key]
            self._features.move_to_end(key)
        while len(self._features) > self.cached_images:
            self._features.popitem(last=False)
        return torch.cat([found[key] for key in keys])


def _is_keyed(image: object) -> bool:
    """Whether an item's image is one whose features are kept; an array of more axes may be several images."""
    return isinstance(image, bytes) or (isinstance(image, np.ndarray) and image.ndim == 3)


def _key(image: bytes | np.ndarray) -> bytes:
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    told = hashlib.sha256(f"{image.dtype.str} {image.shape}".encode())
    told.update(np.ascontiguousarray(image))
    return told.digest()


def _read_image(path: str | PathLike) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--image {path}: {error.strerror}; give the path of an image file") from None
    limits = Limits.of(DataConfig())
    decode_image(
        data, f"--image {path}", limits
    )  # says in one line what is wrong with it; the processor decodes for the model
    return data


def check_auto(folder: str | PathLike) -> None:
    """See that an exported model has a router, before its weights are loaded.

    Raises:
        UserError: it has none.
    """
    if is_exported(folder) and AutoConfig.from_pretrained(folder).router is None:
        raise UserError(
            f"--num-visual-tokens auto: the model in {folder} has no router; train one (tokenflex train-router {folder}), or give a count"
        )


def parse_num_visual_tokens(text: str) -> Count | list[Count]:
    """`144`, `8x12` (rows x columns), `auto`, or a list of these with commas, one per image.

    Raises:
        UserError: anything else, or a count below 1.
    """
    counts: list[Count] = []
    for entry in text.split(","):
        if entry.strip().lower() == AUTO:
            counts.append(AUTO)
            continue
        numbers = entry.lower().split("x")
        if len(numbers) > 2 or not all(number.strip().isdigit() and int(number) > 0 for number in numbers):
            raise UserError(
                f"--num-visual-tokens {text}: {entry!r} is no count; wanted a positive number such as 144, rows x columns such as 8x12, auto, or a list such as 64,256"
            )
        counts.append(int(numbers[0]) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1])))
    return counts[0] if len(counts) == 1 else counts
