"""Conversations and images to model inputs; one rendering for training, evaluation and inference.

Special tokens enter by id only: the chat template is rendered around stand-ins for the messages' content, and the content
itself is tokenized apart with special tokens switched off. So text like `<|im_end|>` or `<img>` in a user's message is
just text, and it works with the chat template of any language model.

Travels with every exported model, so it imports nothing but torch, transformers and its siblings.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack
from transformers.tokenization_utils_base import TextInput

from .image_processing_tokenflex import TokenFlexImageProcessor, TokenFlexImageProcessorKwargs, flattened
from .pooling import sides_of, tile_sides
from .rendering import CALLS, ChatRenderer, RenderingRefused, dated_template, knows_variable, marked_contents
from .router import asks_auto
from .sharing import SHARES, counts_by_size, even_count
from .video import FRAMES_PER_SECOND, MAX_FRAMES, clip_frames

ROLES = ("system", "user", "assistant", "tool")
MAX_KEPT = 4096  # pieces of templates whose tokens are kept
TEXT_KWARGS = (
    "padding", "padding_side", "max_length", "truncation", "pad_to_multiple_of", "add_special_tokens", "return_attention_mask",
    "return_mm_token_type_ids", "return_text_replacement_offsets", "return_tensors", "verbose", "return_token_type_ids",
)  # fmt: skip
"""Keywords of a tokenizer that a call honours; another one is refused."""
FLAT = ("return_mm_token_type_ids", "return_text_replacement_offsets")
RENDERING_KWARGS = ("tools", "documents", "continue_final_message")
ANCHOR = "\n"
LINE_BREAK = ("line break",)  # behind an image


@dataclass
class EncodedConversation:
    """One conversation as tokens.

    input_ids: the tokens, with one run of `image_token_id` per image, all its tiles. is_target: per token, whether it is
    learned. image_starts: where each image's run begins. images: the images of the conversation, in order.
    """

    input_ids: list
    is_target: list
    image_starts: list
    images: list

    def extend(self, ids: list[int], is_target: bool = False) -> None:
        self.input_ids += ids
        self.is_target += [is_target] * len(ids)


class TokenFlexProcessorKwargs(ProcessingKwargs, total=False):
    """What may be given to a call of the processor."""

    images_kwargs: TokenFlexImageProcessorKwargs
    _defaults = {}  # read by transformers before 5.23


class TokenFlexProcessor(ProcessorMixin):
    """Image processor and tokenizer of a TokenFLEX model.

    Args:
        num_visual_tokens: the count per image (per tile, where the image processor tiles) if the caller names none.
        trained_num_visual_tokens: the counts seen in training, among which a total is shared; empty: not known.
        total_visual_tokens: of all images of a prompt together at most, if the caller names neither a total nor counts; 0: no limit.
        share: how images share a total if the caller does not say: `even`, or `size`, by their pixels.
        patch_grid: (rows, columns) of the vision encoder's patches, to shape a count into rows and columns.
        image_start_token, image_token, image_end_token: the tokens around and in place of an image.
        chat_template_options: variables of the chat template, such as `{"enable_thinking": False}`, in every rendering; a
            call's own take precedence.
        frames_per_second, max_frames: how a video file is sampled, and the most frames of a clip; see `clip_frames` in `video.py`.

    Attributes:
        render_date: ISO date that the chat template takes for today's (`strftime_now`); empty is the day it runs on. Not
            exported.

    Raises:
        ValueError: the tokenizer lacks one of the three tokens, or has several chat templates and none of them is `default`.
    """

    valid_processor_kwargs = TokenFlexProcessorKwargs

    def __init__(
        self,
        image_processor: TokenFlexImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | dict[str, str] | None = None,
        num_visual_tokens: int | tuple[int, int] = 256,
        patch_grid: Sequence[int] = (27, 27),
        image_start_token: str = "<img>",
        image_token: str = "<IMG_CONTEXT>",
        image_end_token: str = "</img>",
        chat_template_options: dict[str, Any] | None = None,
        frames_per_second: float = FRAMES_PER_SECOND,
        max_frames: int = MAX_FRAMES,
        trained_num_visual_tokens: Sequence[int] = (),
        total_visual_tokens: int = 0,
        share: str = "even",
        **kwargs: Any,
    ):
        tokens = (image_start_token, image_token, image_end_token)
        missing = missing_tokens(tokenizer, tokens)
        if missing:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} lacks the image tokens {missing}; name three special tokens that "
                "it has (model.image_tokens) or let set-up add them (model.add_image_tokens=true)"
            )
        self.num_visual_tokens = num_visual_tokens
        self.patch_grid = list(patch_grid)
        self.trained_num_visual_tokens = list(trained_num_visual_tokens)
        self.total_visual_tokens = total_visual_tokens
        self.share = share
        self.chat_template_options = dict(chat_template_options or {})
        self.frames_per_second, self.max_frames = frames_per_second, max_frames
        self.render_date = ""
        self._template_cache, self._turn_ends, self._ids = {}, {}, None
        self._blank = None
        self._renderer = ChatRenderer(tokenizer)
        self.image_start_token, self.image_token, self.image_end_token = tokens
        self.image_start_token_id, self.image_token_id, self.image_end_token_id = tokenizer.convert_tokens_to_ids(
            list(tokens)
        )
        tokenizer.padding_side = "left"  # generation goes on at the right
        chat_template = chat_template or tokenizer.chat_template
        default_template(chat_template)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        num_visual_tokens: int | tuple | list | None = None,
        total_visual_tokens: int | None = None,
        share: str | None = None,
        **kwargs: Unpack[TokenFlexProcessorKwargs],
    ) -> BatchFeature | dict[str, Any]:
        """Prompts rendered by `apply_chat_template(..., tokenize=False)` and their images -> model inputs.

        Each `<img><IMG_CONTEXT></img>` of the text, or `<IMG_CONTEXT>` alone, is widened to its image's count. Prefer
        `apply_chat_template(..., tokenize=True)`, which cannot mistake a user's text for a special token.

        Args:
            num_visual_tokens: a count or (rows, columns) for every image, or one for each; under a total the most that an image gets.
            total_visual_tokens: of all images of a prompt together at most. Of the trained counts the largest with which they fit.
            share: `even`: each image gets that count; `size`: large images more of the same sum (images of one tile).
            kwargs: of the tokenizer (`padding`, `padding_side`, `max_length`, `truncation`, ...), of the image processor
                (`CALL_KWARGS` there), or of both (`return_tensors`), flat or in `text_kwargs` and `images_kwargs`.

        Returns:
            `input_ids` and `attention_mask` [B, T], padded on the left; where there are images also `pixel_values` [tiles, 3,
            H, W] and `num_tiles` [images] (and `tile_sizes` where the image processor's `sides` are `aspect`), or with
            `return_text_replacement_offsets` `visual_sides` (see `_per_tile`).

        Raises:
            ValueError: the text has not one image tag per image, or images that a total does not hold; the message has both numbers.
            TypeError: a keyword that neither of them knows.
        """
        if images is None and text is None:
            raise ValueError("neither text nor images came; give at least one of them")
        settings = self._settings(kwargs)
        images = flattened(images)
        if text is None:
            return self._pixels(images, settings)
        texts = [text] if isinstance(text, str) else list(text)
        tags = self._tags(texts, len(images))
        numbers = [len(tags.findall(prompt)) for prompt in texts]
        pixels, entries = self._sized(images, settings, num_visual_tokens, numbers, total_visual_tokens, share)
        lengths = iter(self._run_lengths(self.counts(entries, len(images)), pixels))
        if pixels and settings["return_text_replacement_offsets"]:
            pixels = self._per_tile(pixels, entries)
        rows, spans = self._prompt_rows(texts, tags, lengths, settings)
        batch = self._batch(rows, pixels, settings)
        if settings["return_text_replacement_offsets"]:
            batch["text_replacement_offsets"] = spans
        return batch

    def _prompt_rows(self, texts, tags, lengths, settings):
        """(tokens, replacements) of each prompt, its images as runs of the next `lengths`."""
        rows, spans = [], []
        for prompt in texts:
            pieces, found = tags.split(prompt), tags.findall(prompt)
            runs = [next(lengths) for _ in found]
            ids = self._prompt_ids(pieces[0], is_begin=True)
            for run, piece in zip(runs, pieces[1:]):
                ids = ids + self._image_ids(run) + self._prompt_ids(piece)
            rows.append(self._beginning(settings) + ids)
            spans.append(self._replacements(pieces, found, runs))
        return rows, spans

    def shared_counts(self, count: int, sizes: Sequence[Sequence[Sequence[int]]]) -> list[int]:
        """Visual tokens per tile of each image where each tile has `count` on average, as the processor's `share` says.

        `sizes` are the `image_processor.tile_sizes` of each image.
        """
        if self.share == "even" or not sizes:
            return [count] * len(sizes)
        return counts_by_size(count, [height * width for ((height, width),) in sizes], self.patch_grid)

    def _sized(self, images, settings, num_visual_tokens, numbers, total, share):
        """(pixels of images, a count or (rows, columns) of each); `numbers` are the images of each prompt."""
        if total is None:
            total = self.total_visual_tokens if num_visual_tokens is None else 0
        self._check_total(num_visual_tokens, total, share)
        if not total:
            return self._pixels(images, settings), self._entries(num_visual_tokens, len(images))
        share = self.share if share is None else share
        pixels = self._pixels(images, settings, return_tile_sizes=True)
        tiles = iter(pixels["num_tiles"].tolist() if images else [])
        sizes = iter(pixels["tile_sizes"].tolist() if images else [])
        entries, own = [], iter(self._entries(num_visual_tokens, len(images)))
        for number in numbers:
            counts, some = [next(own) for _ in range(number)], [next(tiles) for _ in range(number)]
            shown = [[next(sizes) for _ in range(its)] for its in some]
            entries += self._within_total(
                counts, shown, total, share, is_one=not isinstance(num_visual_tokens, (list, tuple))
            )
        if self.image_processor.sides == "square":
            pixels.pop("tile_sizes", None)
        return pixels, entries

    def _check_total(self, num_visual_tokens, total, share):
        if isinstance(total, bool) or not isinstance(total, int) or total < 0:
            raise ValueError(
                f"total_visual_tokens is {total!r}; it must be a positive integer such as 512, or 0 for no limit"
            )
        if share is not None and not total:
            raise ValueError(f"share={share!r} is of a total, and there is none; give total_visual_tokens, such as 512")
        if share not in (None, *SHARES):
            raise ValueError(
                f"share is {share!r}; it must be one of {', '.join(SHARES)} (a router shares in model.generate, at 'auto')"
            )
        if total and not isinstance(num_visual_tokens, (list, tuple)) and not self.trained_num_visual_tokens:
            raise ValueError(
                f"total_visual_tokens={total}: this processor does not say which counts its model was trained at; set its "
                "trained_num_visual_tokens, or give num_visual_tokens per image"
            )

    def _within_total(self, counts, sizes, total, share, is_one):
        """The counts of a prompt's images under a total; `sizes` of each image's tiles."""
        if not counts:
            return []
        tiles = [len(some) for some in sizes]
        if not is_one:  # the caller's own, which are held or refused
            came = sum(own * number for own, number in zip(self.counts(counts, len(counts)), tiles))
            if came > total:
                raise ValueError(
                    f"num_visual_tokens {counts} come to {came} visual tokens in a prompt, more than total_visual_tokens={total}; "
                    "give smaller ones, or one count for all images, which then share the total"
                )
            return counts
        count = even_count(counts[0], self.trained_num_visual_tokens, sum(tiles), total)
        if share == "even":
            return [count] * len(counts)
        if max(tiles) > 1:
            raise ValueError(
                "share='size' is for images of one tile; a larger image has more tiles already: share evenly, or max_tiles=1"
            )
        return counts_by_size(count, [height * width for ((height, width),) in sizes], self.patch_grid)

    def tile_sides(
        self, num_visual_tokens: int | tuple[int, int], sizes: Sequence[Sequence[int]]
    ) -> list[tuple[int, int]]:
        """(rows, columns) of visual tokens of each tile of an image; `sizes` are its `image_processor.tile_sizes`."""
        return tile_sides(num_visual_tokens, sizes, self.patch_grid, self.image_processor.sides)

    def _per_tile(self, pixels, entries):
        """Pixels of images with `visual_sides` [tiles, 3], rows, columns and which tile of its image, in place of `num_tiles`.

        Engines that keep images apart cut every field by tiles; the model's `get_image_features` takes them so.
        """
        tiles = [int(number) for number in pixels["num_tiles"]]
        sizes = iter(pixels["tile_sizes"].tolist() if "tile_sizes" in pixels else [(1, 1)] * sum(tiles))
        rows = []
        for entry, number in zip(entries, tiles):
            sides = self.tile_sides(entry, [next(sizes) for _ in range(number)])
            rows += [[*side, tile] for tile, side in enumerate(sides)]
        return {"pixel_values": pixels["pixel_values"], "visual_sides": rows}

    def _tags(self, texts, num_images):
        """A pattern of the image tags in prompts.

        Raises:
            ValueError: not one per image.
        """
        tag = "".join(self._image_tokens())
        tags = re.compile(f"{re.escape(tag)}|{re.escape(self.image_token)}")
        num_tags = sum(len(tags.findall(prompt)) for prompt in texts)
        if num_tags != num_images:
            raise ValueError(
                f"the text has {num_tags} image tags {tag} but {num_images} images came; the number of {self.image_token} "
                "tokens in the prompts should be the same as the number of images: each image needs one tag"
            )
        return tags

    def _prompt_ids(self, piece, is_begin=False):
        return self._rows([piece], is_begin)[0] if piece else []

    def _beginning(self, settings):
        """What `add_special_tokens=True` puts first; a rendered prompt has it already, so that nothing is the default."""
        if not settings["text"].get("add_special_tokens"):
            return []
        return self.tokenizer("", add_special_tokens=True)["input_ids"][:1]

    def _replacements(self, pieces, found, runs):
        """Where the image tokens of a prompt were, and what stands there now, as transformers' processors say it.

        A token that has its start and end beside it is replaced by the run alone, so that whoever repeats the replacement in
        a prompt of tokens, as servers do, has each of them once.
        """
        spans, old, new = [], len(pieces[0]), len(pieces[0])
        for tag, run, piece in zip(found, runs, pieces[1:]):
            is_whole = tag != self.image_token
            before, after = (len(self.image_start_token), len(self.image_end_token)) if is_whole else (0, 0)
            text = self.image_token * run if is_whole else self._run_text(run)
            span = (old + before, old + before + len(self.image_token))
            new_span = (new + before, new + before + len(text))
            entry = {"type": "image", "span": span, "new_span": new_span, "text": self.image_token, "replacement": text}
            spans.append(entry)
            old, new = span[1] + after + len(piece), new_span[1] + after + len(piece)
        return spans

    def _run_text(self, run):
        return self.image_start_token + self.image_token * run + self.image_end_token

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that stands for one image of `image_inputs` at the processor's own count."""
        (count,) = self.counts(kwargs.get("num_visual_tokens"), 1)
        return self._run_text(count * int(image_inputs["num_tiles"][image_idx]))

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Visual tokens and tiles of images by their (height, width), as a call with these keywords makes them; servers ask."""
        if image_sizes is None:
            return MultiModalData()
        names = {*self.image_processor.valid_kwargs.__annotations__}
        images = self.image_processor._for_call({name: kwargs[name] for name in names if name in kwargs})
        heights, widths = (torch.tensor([size[axis] for size in image_sizes]).numpy() for axis in (0, 1))
        tiles = images.num_tiles(widths, heights).tolist()
        counts = self.counts(kwargs.get("num_visual_tokens"), len(tiles))
        lengths = [count * number for count, number in zip(counts, tiles)]
        return MultiModalData(num_image_tokens=lengths, num_image_patches=tiles)

    def _settings(self, kwargs):
        """Keywords of a call, parted: `text` and `images` by name, and the flat ones of a processor.

        Raises:
            TypeError: a keyword that is not known. ValueError: one that is given twice, or is not done here.
        """
        kinds = TokenFlexProcessorKwargs.__annotations__
        known = {"common_kwargs", *kinds, *self.image_processor.valid_kwargs.__annotations__}
        known |= {name for kind in kinds.values() for name in getattr(kind, "__annotations__", {})}
        own = {*self.image_processor.valid_kwargs.__annotations__}
        for place, names, allowed in (
            ("", kwargs, known),
            ("text_kwargs.", kwargs.get("text_kwargs") or {}, {*kinds["text_kwargs"].__annotations__, *FLAT}),
            ("images_kwargs.", kwargs.get("images_kwargs") or {}, own),
        ):
            unknown = [name for name in names if name not in allowed]
            if unknown:
                raise TypeError(f"unknown keyword argument {place}{unknown[0]}; see the processor's __call__")
        merged = self._merge_kwargs(
            TokenFlexProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        given = {**kwargs.get("common_kwargs", {}), **kwargs, **kwargs.get("text_kwargs", {})}
        for name in kinds["text_kwargs"].__annotations__:
            if given.get(name) and name not in TEXT_KWARGS:
                raise ValueError(f"{name}={given[name]!r} is not done here; known are {', '.join(TEXT_KWARGS)}")
        text = {"padding": True, "return_tensors": "pt", **merged["text_kwargs"]}
        text["padding_side"] = given.get("padding_side") or "left"  # generation goes on at the right
        images = {name: value for name, value in merged["images_kwargs"].items() if name in own}
        flat = {name: bool(given.get(name)) for name in FLAT}
        return {"text": text, "images": {"return_tensors": "pt", **images}, **flat}

    def counts(
        self, num_visual_tokens: int | tuple[int, int] | Sequence[int | tuple[int, int]] | None, num_images: int
    ) -> list[int]:
        """One count per image from an int, a pair (rows, columns), or a list of them; default: the processor's own."""
        entries = self._entries(num_visual_tokens, num_images)
        return [rows * columns for rows, columns in (sides_of(entry, self.patch_grid) for entry in entries)]

    def _entries(self, num_visual_tokens, num_images):
        """A count or (rows, columns) per image from what the caller gave."""
        if num_visual_tokens is None:
            num_visual_tokens = self.num_visual_tokens
        if isinstance(num_visual_tokens, (int, tuple)):
            num_visual_tokens = [num_visual_tokens] * num_images
        if asks_auto(num_visual_tokens):
            raise ValueError(
                "num_visual_tokens='auto' is the model's to choose: leave it out here, and give it to model.generate"
            )
        if len(num_visual_tokens) != num_images:
            raise ValueError(
                f"num_visual_tokens has {len(num_visual_tokens)} entries for {num_images} images; give one per image"
            )
        return list(num_visual_tokens)

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        return_assistant_tokens_mask: bool = False,
        num_visual_tokens: int | tuple[int, int] | list[int | tuple[int, int]] | None = None,
        total_visual_tokens: int | None = None,
        share: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render conversations (role/content messages; content a string or a list of text, image and video items).

        With `tokenize=False` the prompt as text. With `tokenize=True` the model inputs as `__call__` returns them, or with
        `return_dict=False` the `input_ids` alone. Images are an item's `image`, `path`, `url` or `base64`, videos its `video` (see `frames`).

        Args:
            chat_template: a template, or the name of one of the tokenizer's; by default the processor's own.
            return_assistant_tokens_mask: whether `assistant_masks` come along: 1 for what training would learn.
            num_visual_tokens, total_visual_tokens, share: see `__call__`; a total is of each conversation.
            processor_kwargs: keywords of `__call__`, which may also stand among the others.
            kwargs: variables of the chat template (`tools`, ...); `sanitize_control_tokens`: they, too, may spell no special token.

        Raises:
            TypeError: a keyword that neither the template nor the processor knows. ValueError: a variable that spells a special token.
        """
        conversations, is_batch = _as_batch(_plain(conversation))
        template = self._template(chat_template)
        options, calls = self._template_options(template, kwargs, tokenize)
        rendered = [self._pieces(messages, add_generation_prompt, template, options) for messages in conversations]
        if not tokenize:
            texts = [self._as_text(pieces, marks) for pieces, _, marks in rendered]
            return texts if is_batch else texts[0]
        settings = self._settings({"return_tensors": return_tensors, **(processor_kwargs or {}), **calls})
        images = [_images_of(contents) for _, contents, _ in rendered]
        flat, numbers = [image for some in images for image in some], [len(some) for some in images]
        pixels, entries = self._sized(flat, settings, num_visual_tokens, numbers, total_visual_tokens, share)
        lengths = iter(self._run_lengths(self.counts(entries, len(flat)), pixels))
        rows, masks = [], []
        for (pieces, contents, marks), some in zip(rendered, images):
            encoded = self._encoded(pieces, contents, marks, [next(lengths) for _ in some], template)
            rows.append(encoded.input_ids)
            masks.append([int(is_target) for is_target in encoded.is_target])
        batch = self._batch(rows, pixels, settings, masks if return_assistant_tokens_mask else None)
        return batch if return_dict else batch["input_ids"]

    def _as_text(self, pieces, marks):
        tag = "".join(self._image_tokens())
        return "".join(marks.sub(tag, piece.text) if piece.message >= 0 else piece.text for piece in pieces)

    def _template_options(self, template, kwargs, tokenize):
        """Keywords parted into variables of the template and keywords of `__call__`."""
        options, calls = {}, {}
        for name, value in kwargs.items():
            if name in RENDERING_KWARGS or knows_variable(template, name):
                options[name] = value
            else:
                calls[name] = value
        if calls.pop("sanitize_control_tokens", False):
            self._check_sanitized(options, tokenize)
        return {name: value for name, value in options.items() if value is not None}, calls

    def encode(
        self,
        messages: list[dict[str, Any]],
        lengths: Sequence[int],
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> EncodedConversation:
        """One conversation -> `EncodedConversation`, image i as a run of `lengths[i]` placeholders (0 is allowed: no run).

        A run is as long as the image's visual tokens: its count times its tiles.

        Learned is what the model has to write behind the generation prompt of the messages before: the assistant's content,
        whatever the template puts before it, and up to the token that ends its turn. An answer before which something else
        than its generation prompt stands is context, and so is one of the weight 0.

        Raises:
            ValueError: not as many lengths as images. RenderingRefused, which is one: the template leaves out, repeats or
                moves a message, or no answer stands behind its generation prompt.
        """
        must_teach = not add_generation_prompt
        pieces, contents, marks = self._pieces(messages, add_generation_prompt, chat_template, kwargs, must_teach)
        return self._encoded(pieces, contents, marks, lengths, self._template(chat_template))

    def turn_end_id(self, chat_template: str | None = None) -> int | None:
        """The token that ends an answer in this chat template: what generation has to stop at. None where there is none."""
        template = self._template(chat_template)
        if template not in self._turn_ends:
            ids = self._template_ids(self._renderer.closing(template, self._options({})))
            length, is_special = self._closing(ids)
            self._turn_ends[template] = ids[length - 1] if is_special else None
        return self._turn_ends[template]

    def rendering_key(self) -> str:
        """What the tokens of a conversation depend on beside the tokenizer and the images, as text.

        The template itself where it writes texts as they are, right behind the generation prompt and right before the token
        that ends the turn: so indexes of earlier releases stay valid where their lengths are right.
        """
        key = str(default_template(self.chat_template))
        if self.chat_template_options:
            key += "\0" + repr(sorted(self.chat_template_options.items()))
        messages = [{"role": role, "content": f" {role} "} for role in ("user", "assistant") * 2]
        try:
            pieces, contents, _ = self._pieces(messages, False, None, {})
            outline_form = self._renderer.form(messages, self._template(None), self._options({}))
        except (jinja2.TemplateError, ValueError):
            return key + "\0refused"
        ends = [piece for piece in pieces if piece.ends_turn]
        is_plain = (
            outline_form == "text"
            and len(ends) == 2
            and all(self._closing(self._template_ids(piece.text)) == (1, True) for piece in ends)
            and all(piece.is_kept for piece in pieces)
            and not any(piece.is_learned for piece in pieces if piece.message < 0)
        )
        return key if is_plain and not self._adds_blank() else key + "\0fitted"

    def _encoded(self, pieces, contents, marks, lengths, template):
        num_images = sum(item["type"] == "image" for items in contents for item in items or ())
        if num_images != len(lengths):
            raise ValueError(
                f"the conversation has {num_images} image tags but {len(lengths)} images; each image needs one tag"
            )
        images = [item for items in contents for item in items or () if item["type"] == "image"]
        parts = [self._parts(piece, contents, marks) for piece in pieces]
        for blank, own, said in zip(pieces, parts, parts[1:]):
            # a blank that the model has to write before its answer is one text with it, as it will write it
            if blank.message < 0 and blank.is_learned and blank.text.isspace() and said and isinstance(said[0], str):
                said[0], own[:] = blank.text + said[0], []
        texts = [
            part for piece, some in zip(pieces, parts) if piece.message >= 0 for part in some if isinstance(part, str)
        ]
        text_ids = iter(self._text_ids(texts))
        encoded, lengths = EncodedConversation([], [], [], []), iter(lengths)
        for number, (piece, some) in enumerate(zip(pieces, parts)):
            if piece.message < 0:
                self._extend_by_template(encoded, piece, some, template, is_last=number == len(pieces) - 1)
                continue
            for part in some:
                if isinstance(part, str):
                    encoded.extend(next(text_ids), is_target=piece.is_learned)
                elif part == LINE_BREAK:
                    encoded.extend(self._template_ids("\n"))
                else:
                    encoded.image_starts.append(len(encoded.input_ids) + 1)
                    encoded.images.append(_image_of(images[part]))
                    encoded.extend(self._image_ids(next(lengths)))
        return encoded

    def _parts(self, piece, contents, marks):
        """A piece as a list of texts, numbers of images, and the line breaks behind them."""
        if piece.message < 0:
            return [piece.text] if piece.text else []
        if piece.is_kept:  # item by item, as the message has them
            number = sum(item["type"] == "image" for items in contents[: piece.message] for item in items or ())
            parts = []
            for item in contents[piece.message]:
                parts += [number, LINE_BREAK] if item["type"] == "image" else [item["text"]]
                number += item["type"] == "image"
            return parts
        parts = []
        for at, part in enumerate(marks.split(piece.text)):
            if at % 2:
                parts.append(int(part))
            elif at and part.startswith("\n"):
                parts += [LINE_BREAK, part[1:]]
            else:
                parts.append(part)
        return [part for part in parts if part != ""]

    def _extend_by_template(self, encoded, piece, some, template, is_last):
        ids = self._template_ids(some[0], is_begin=not encoded.input_ids) if some else []
        if not piece.ends_turn:
            encoded.extend(ids, is_target=piece.is_learned)
            return
        length, is_special = self._closing(ids)
        if is_last and not is_special:  # a template that leaves the last answer open, as GLM's do
            end = self.turn_end_id(template)
            ids, length = (ids, len(ids)) if end is None else ([*ids, end], len(ids) + 1)
        encoded.extend(ids[:length], is_target=True)
        encoded.extend(ids[length:])

    def _closing(self, ids):
        """(how many tokens behind an answer end its turn, whether the last of them is a token of its own)."""
        for special in self._special_ids():
            place = next((place for place, token in enumerate(ids) if token in special), None)
            if place is not None:
                return place + 1, True
        return min(1, len(ids)), False

    def is_special(self, token_id: int) -> bool:
        """Whether a token is one that no text spells."""
        return any(token_id in special for special in self._special_ids())

    def _special_ids(self):
        """The ids of special tokens, and those of all added ones, of which some tokenizers make their ends of turn."""
        if self._ids is None:
            added = self.tokenizer.added_tokens_decoder
            special = {index for index, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
            self._ids = (frozenset(special), frozenset(added))
        return self._ids

    def _template_ids(self, piece, is_begin=False):
        """Tokens of a piece of the chat template; there are few of them, so they are kept."""
        key = (piece, is_begin)
        if key not in self._template_cache:
            if len(self._template_cache) > MAX_KEPT:
                self._template_cache.clear()
            self._template_cache[key] = self._rows([piece], is_begin)[0] if piece else []
        return self._template_cache[key]

    def _rows(self, texts, is_begin=False, **options):
        """Tokens of texts that stand within a conversation, or at its begin.

        Some tokenizers (sentencepiece's) write a blank before whatever they are given; within a conversation that blank would
        be the tokenizer's, not the template's, so such a text is given behind a line break, whose tokens are taken off.
        """
        rows = self.tokenizer(texts, add_special_tokens=False, **options)["input_ids"]
        if is_begin or not self._adds_blank():
            return rows
        anchor = self.tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
        behind = self.tokenizer([ANCHOR + text for text in texts], add_special_tokens=False, **options)["input_ids"]
        return [row[len(anchor) :] if row[: len(anchor)] == anchor else alone for row, alone in zip(behind, rows)]

    def _adds_blank(self):
        if self._blank is None:
            alone, behind = self.tokenizer(["x", ANCHOR + "x"], add_special_tokens=False)["input_ids"]
            anchor = self.tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
            is_blank = str(self.tokenizer.convert_ids_to_tokens(alone[:1])[0]).startswith("\u2581")
            self._blank = is_blank and behind[: len(anchor)] == anchor and behind[len(anchor) :] != alone
        return self._blank

    def _text_ids(self, texts):
        """Tokens of messages' texts, in which nothing is a special token, whatever it spells."""
        if not texts:
            return []
        own = {self.image_start_token_id, self.image_token_id, self.image_end_token_id}
        encode = lambda some: self._rows(some, split_special_tokens=True)  # noqa: E731
        rows = encode(texts)
        for number, ids in enumerate(rows):
            if not own.isdisjoint(ids):  # an image token that the tokenizer does not know as special
                spelled = "|".join(re.escape(token[1:]) for token in self._image_tokens())
                rows[number] = [token for part in encode(re.split(f"(?={spelled})", texts[number])) for token in part]
        return rows

    def _image_tokens(self):
        return self.image_start_token, self.image_token, self.image_end_token

    def _pieces(self, messages, add_generation_prompt, chat_template, options, must_teach=False):
        """Pieces of the rendered conversation, the items of each message (None: tool calls only), the marks of images."""
        contents = [self._items(message) for message in messages]
        self._check_spelling(messages)
        texts, marks = marked_contents(contents, len("".join(self._image_tokens())))
        pieces = self._renderer.pieces(
            messages, texts, self._template(chat_template), self._options(options), add_generation_prompt, must_teach
        )
        for piece in pieces:
            if (
                piece.message >= 0
                and not piece.is_kept
                and marks.findall(piece.text) != marks.findall(texts[piece.message])
            ):
                raise RenderingRefused(f"the chat template leaves out or moves an image of message {piece.message}")
        return pieces, contents, marks

    def frames(self, clip: object) -> list[Any]:
        """The frames of a clip (a video file's path or bytes, or a list of frames) as images; see `clip_frames`.

        Raises:
            ValueError: an empty clip, one of too many frames, or a file that does not decode. ImportError: PyAV is missing.
        """
        return clip_frames(clip, self.frames_per_second, self.max_frames)

    def _items(self, message):
        """A message's content as a list of text and image items, an image for each frame of a video; None: tool calls only."""
        items = _items(message)
        if not any(item["type"] == "video" for item in items or ()):
            return items
        framed = []
        for item in items:
            clip = next((item[key] for key in ("video", "path", "url") if item.get(key) is not None), None)
            is_clip = item["type"] == "video"
            framed += [{"type": "image", "image": frame} for frame in self.frames(clip)] if is_clip else [item]
        return framed

    def _check_spelling(self, messages):
        """What else a message holds is written by the template, where a special token would be one."""
        for at, message in enumerate(messages):
            if message.keys() <= {"role", "content", "weight"} and message["role"] in ROLES:
                continue
            spelled = self._spelled({key: value for key, value in message.items() if key not in ("content", "weight")})
            if spelled:
                raise ValueError(f"message {at} spells the special token {spelled!r} outside of its content")

    def _check_sanitized(self, options, tokenize):
        if not tokenize:
            raise ValueError(
                "sanitize_control_tokens=True came with tokenize=False; a prompt as text cannot say what is a special token: set "
                "tokenize=True"
            )
        for name, value in options.items():
            spelled = self._spelled(value)
            if spelled:
                raise ValueError(
                    f"{name} spells the special token {spelled!r}, which the chat template would write as one; take it out, or leave "
                    "sanitize_control_tokens out"
                )

    def _spelled(self, value):
        """The first special token that something spells, or None."""
        text, tokens = str(value), self.tokenizer.added_tokens_decoder.values()
        return next((token.content for token in tokens if token.special and token.content in text), None)

    def _template(self, chat_template):
        """The template of this call: its text, the name of one of the tokenizer's, or the processor's own; with the date."""
        for named in (self.chat_template, self.tokenizer.chat_template):
            if chat_template is not None and isinstance(named, dict) and chat_template in named:
                chat_template = named[chat_template]
        return dated_template(chat_template or default_template(self.chat_template), self.render_date)

    def _options(self, options):
        return {**self.chat_template_options, **options}

    def _image_ids(self, length):
        return [self.image_start_token_id, *[self.image_token_id] * length, self.image_end_token_id]

    def _pixels(self, images, settings, **options):
        """What the image processor makes of images (PIL, bytes, array, path or URL), or nothing where there are none."""
        return self.image_processor(images, **settings["images"], **options) if images else {}

    def _run_lengths(self, counts, pixels):
        """Visual tokens of each image: the count once per tile."""
        return [count * number for count, number in zip(counts, pixels["num_tiles"].tolist())] if pixels else []

    def _batch(self, rows, pixels, settings, masks=None):
        """Rows of tokens as padded model inputs, with what else was asked for.

        Raises:
            ValueError: truncation would cut into an image; rows of several lengths and no padding.
        """
        text = settings["text"]
        if text.get("truncation") and text.get("max_length"):
            side = (
                slice(-text["max_length"], None)
                if self.tokenizer.truncation_side == "left"
                else slice(text["max_length"])
            )
            cut = [row[side] for row in rows]
            if any(a.count(self.image_token_id) != b.count(self.image_token_id) for a, b in zip(rows, cut)):
                raise ValueError(
                    f"max_length={text['max_length']} would cut into an image; give more, or fewer visual tokens"
                )
            rows, masks = cut, masks and [mask[side] for mask in masks]
        length = self._padded_length(rows, text)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        is_right = text["padding_side"] == "right"

        def padded(some, value):
            blanks = [[value] * (length - len(row)) for row in some]
            return [row + blank if is_right else blank + row for row, blank in zip(some, blanks)]

        data = {"input_ids": padded(rows, pad)}
        if text.get("return_attention_mask") is not False:
            data["attention_mask"] = padded([[1] * len(row) for row in rows], 0)
        if settings["return_mm_token_type_ids"]:
            types = [[int(token == self.image_token_id) for token in row] for row in rows]
            data["mm_token_type_ids"] = padded(types, 0)
        if masks is not None:
            data["assistant_masks"] = padded(masks, 0)
        if text["return_tensors"] and len({len(row) for row in data["input_ids"]}) > 1:
            raise ValueError("the prompts are of several lengths, which no tensor holds; set padding=True")
        return BatchFeature({**data, **pixels}, tensor_type=text["return_tensors"])

    def _padded_length(self, rows, text):
        """The length that rows are padded to; 0 for each its own."""
        padding, longest = text["padding"], max(map(len, rows))
        if padding in (False, "do_not_pad"):
            return 0
        length = text.get("max_length") or self.tokenizer.model_max_length if padding == "max_length" else longest
        multiple = text.get("pad_to_multiple_of") or 1
        return -(-max(length, longest) // multiple) * multiple

    @property
    def unused_input_names(self) -> list[str]:
        """None of the parts' outputs is dropped."""
        return []

    def save_pretrained(self, *args: Any, **kwargs: Any) -> list[str]:
        """Write the processor and its code; the addresses of the code are of the files alone, not of this object."""
        saved = super().save_pretrained(*args, **kwargs)
        for part in (self, self.image_processor):
            vars(part).pop("auto_map", None)
        return saved


def _as_batch(conversation):
    """(list of conversations, whether it came as one)."""
    is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
    return (conversation if is_batch else [conversation]), is_batch


def missing_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[str]:
    """Those of `tokens` that are not single tokens of `tokenizer`."""
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    return [
        token for token, index in zip(tokens, ids) if index is None or tokenizer.convert_ids_to_tokens(index) != token
    ]


def default_template(template: str | dict[str, str] | None) -> str | None:
    """The chat template itself, or of several by name the one that is named `default`, or the only one.

    Raises:
        ValueError: several, and none of them is the default.
    """
    if not isinstance(template, dict):
        return template
    if "default" not in template and len(template) != 1:
        raise ValueError(f"the tokenizer has the chat templates {sorted(template)} and none named 'default'; name one")
    return template.get("default", next(iter(template.values())))


def _images_of(contents):
    """What the image items of a conversation's contents name."""
    return [_image_of(item) for items in contents for item in items or () if item["type"] == "image"]


def _image_of(item):
    """What an image item names its image by."""
    named = next(
        (item[key] for key in ("image", "path", "url", "image_url", "base64") if item.get(key) is not None), None
    )
    return named.get("url") if isinstance(named, dict) and "url" in named else named


def _plain(value):
    """Messages, and items of their content, that are objects (a dataclass, OpenAI's client's) as dictionaries of what is set in them."""
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: _plain(entry) if key == "content" else entry for key, entry in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "model_dump"):
        value = value.model_dump()
    else:
        return value
    return _plain({key: entry for key, entry in value.items() if entry is not None})


def _items(message):
    """A message's content as a list of text and image items; None for one that has tool calls only."""
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not content:
        return None if any(message.get(key) for key in CALLS) else []
    items = [{"type": "text", "text": item} if isinstance(item, str) else item for item in content]
    for item in items:
        kind = item.get("type")
        known = ("text", "image", "image_url", "video")
        if kind not in known or (kind == "text" and not isinstance(item.get("text"), str)):
            raise ValueError(
                f"a message holds an item of type {kind!r}; known are 'text' with its text, 'image' and 'video'"
            )
    return [{**item, "type": "image"} if item["type"] == "image_url" else item for item in items]
