"""Conversations and images to model inputs; one rendering for training, evaluation and inference.

Special tokens enter by id only: the chat template is rendered around stand-ins for the messages' content, and the content
itself is tokenized apart with special tokens switched off. So text like `<|im_end|>` or `<img>` in a user's message is
just text, and it works with the chat template of any language model.

Travels with every exported model, so it imports nothing but torch, transformers and its siblings.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

from .pooling import sides_of
from .rendering import CALLS, ChatRenderer, RenderingRefused, dated_template, marked_contents

ROLES = ("system", "user", "assistant", "tool")
MAX_KEPT = 4096  # pieces of templates whose tokens are kept
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

    def extend(self, ids, is_target=False):
        self.input_ids += ids
        self.is_target += [is_target] * len(ids)


class TokenFlexProcessor(ProcessorMixin):
    """Image processor and tokenizer of a TokenFLEX model.

    Args:
        num_visual_tokens: the count per image (per tile, where the image processor tiles) if the caller names none.
        patch_grid: (rows, columns) of the vision encoder's patches, to shape a count into rows and columns.
        image_start_token, image_token, image_end_token: the tokens around and in place of an image.
        chat_template_options: variables of the chat template, such as `{"enable_thinking": False}`, in every rendering; a
            call's own take precedence.

    Attributes:
        render_date: ISO date that the chat template takes for today's (`strftime_now`); empty is the day it runs on. Not
            exported.

    Raises:
        ValueError: the tokenizer lacks one of the three tokens, or has several chat templates and none of them is `default`.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        num_visual_tokens=256,
        patch_grid=(27, 27),
        image_start_token="<img>",
        image_token="<IMG_CONTEXT>",
        image_end_token="</img>",
        chat_template_options=None,
        **kwargs,
    ):
        tokens = (image_start_token, image_token, image_end_token)
        missing = missing_tokens(tokenizer, tokens)
        if missing:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} lacks the image tokens {missing}; name three special tokens that "
                "it has (model.image_tokens) or let set-up add them (model.add_image_tokens=true)"
            )
        self.num_visual_tokens = num_visual_tokens
        self.patch_grid = tuple(patch_grid)
        self.chat_template_options = dict(chat_template_options or {})
        self.render_date = ""
        self._template_cache, self._turn_ends, self._ids = {}, {}, None
        self._renderer = ChatRenderer(tokenizer)
        self.image_start_token, self.image_token, self.image_end_token = tokens
        self.image_start_token_id, self.image_token_id, self.image_end_token_id = tokenizer.convert_tokens_to_ids(
            list(tokens)
        )
        super().__init__(
            image_processor, tokenizer, chat_template=default_template(chat_template or tokenizer.chat_template)
        )

    def __call__(self, images=None, text=None, num_visual_tokens=None, return_tensors="pt", **kwargs):
        """Prompts rendered by `apply_chat_template(..., tokenize=False)` and their images -> model inputs.

        Each `<img><IMG_CONTEXT></img>` of the text is widened to its image's count. Prefer `apply_chat_template(...,
        tokenize=True)`, which cannot mistake a user's text for a special token.

        Returns:
            `input_ids` and `attention_mask` [B, T], padded on the left; where there are images also `pixel_values` [tiles, 3,
            H, W] and `num_tiles` [images].

        Raises:
            ValueError: the text has not one image tag per image; the message has both numbers.
        """
        texts = [text] if isinstance(text, str) else list(text)
        images = _flatten(images)
        tag = self.image_start_token + self.image_token + self.image_end_token
        num_tags = sum(prompt.count(tag) for prompt in texts)
        if num_tags != len(images):
            raise ValueError(
                f"the text has {num_tags} image tags {tag} but {len(images)} images came; each image needs one tag"
            )
        pixels = self._pixels(images)
        lengths = iter(self._run_lengths(self.counts(num_visual_tokens, len(images)), pixels))
        encode = lambda piece: self.tokenizer(piece, add_special_tokens=False)["input_ids"]  # noqa: E731
        rows = []
        for prompt in texts:
            ids = []
            for index, piece in enumerate(prompt.split(tag)):
                ids += self._image_ids(next(lengths)) if index else []
                ids += encode(piece)
            rows.append(ids)
        return self._batch(rows, pixels, return_tensors)

    def counts(self, num_visual_tokens, num_images):
        """One count per image from an int, a pair (rows, columns), or a list of them; default: the processor's own."""
        if num_visual_tokens is None:
            num_visual_tokens = self.num_visual_tokens
        if isinstance(num_visual_tokens, (int, tuple)):
            num_visual_tokens = [num_visual_tokens] * num_images
        if len(num_visual_tokens) != num_images:
            raise ValueError(
                f"num_visual_tokens has {len(num_visual_tokens)} entries for {num_images} images; give one per image"
            )
        sides = [sides_of(count, self.patch_grid) for count in num_visual_tokens]
        return [rows * columns for rows, columns in sides]

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        add_generation_prompt=False,
        tokenize=False,
        return_dict=True,
        return_tensors="pt",
        num_visual_tokens=None,
        **kwargs,
    ):
        """Render conversations (role/content messages; content a string or a list of text and image items).

        With `tokenize=False` the prompt as text. With `tokenize=True` the model inputs as `__call__` returns them, or with
        `return_dict=False` the `input_ids` alone. Images are taken from the items' `image`, `path` or `url` entry.
        """
        is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if is_batch else [conversation]
        if not tokenize:
            tag = "".join(self._image_tokens())
            texts = []
            for messages in conversations:
                pieces, _, marks = self._pieces(messages, add_generation_prompt, chat_template, kwargs)
                texts.append("".join(marks.sub(tag, p.text) if p.message >= 0 else p.text for p in pieces))
            return texts if is_batch else texts[0]
        images = [
            [_image_of(item) for message in messages for item in _items(message) or () if item["type"] == "image"]
            for messages in conversations
        ]
        pixels = self._pixels([image for some in images for image in some])
        lengths = self._run_lengths(self.counts(num_visual_tokens, sum(map(len, images))), pixels)
        rows = []
        for messages, some in zip(conversations, images):
            pieces, contents, marks = self._pieces(messages, add_generation_prompt, chat_template, kwargs)
            encoded = self._encoded(pieces, contents, marks, lengths[: len(some)], self._template(chat_template))
            lengths = lengths[len(some) :]
            rows.append(encoded.input_ids)
        batch = self._batch(rows, pixels, return_tensors)
        return batch if return_dict else batch["input_ids"]

    def encode(self, messages, lengths, add_generation_prompt=False, chat_template=None, **kwargs):
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

    def turn_end_id(self, chat_template=None):
        """The token that ends an answer in this chat template: what generation has to stop at. None where there is none."""
        template = self._template(chat_template)
        if template not in self._turn_ends:
            ids = self._template_ids(self._renderer.closing(template, self._options({})))
            length, is_special = self._closing(ids)
            self._turn_ends[template] = ids[length - 1] if is_special else None
        return self._turn_ends[template]

    def rendering_key(self):
        """What the tokens of a conversation depend on beside the tokenizer and the images, as text.

        The template itself where it writes texts as they are, right behind the generation prompt and right before the token
        that ends the turn: so indexes of earlier releases stay valid where their lengths are right.
        """
        key = str(self.chat_template)
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
        return key if is_plain else key + "\0fitted"

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
        ids = self._template_ids(some[0]) if some else []
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

    def is_special(self, token_id):
        """Whether a token is one that no text spells."""
        return any(token_id in special for special in self._special_ids())

    def _special_ids(self):
        """The ids of special tokens, and those of all added ones, of which some tokenizers make their ends of turn."""
        if self._ids is None:
            added = self.tokenizer.added_tokens_decoder
            special = {index for index, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
            self._ids = (frozenset(special), frozenset(added))
        return self._ids

    def _template_ids(self, piece):
        """Tokens of a piece of the chat template; there are few of them, so they are kept."""
        if piece not in self._template_cache:
            if len(self._template_cache) > MAX_KEPT:
                self._template_cache.clear()
            self._template_cache[piece] = self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
        return self._template_cache[piece]

    def _text_ids(self, texts):
        """Tokens of messages' texts, in which nothing is a special token, whatever it spells."""
        if not texts:
            return []
        own = {self.image_start_token_id, self.image_token_id, self.image_end_token_id}
        encode = lambda some: self.tokenizer(some, add_special_tokens=False, split_special_tokens=True)["input_ids"]  # noqa: E731
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
        contents = [_items(message) for message in messages]
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

    def _check_spelling(self, messages):
        """What else a message holds is written by the template, where a special token would be one."""
        for at, message in enumerate(messages):
            if message.keys() <= {"role", "content", "weight"} and message["role"] in ROLES:
                continue
            rest = str({key: value for key, value in message.items() if key not in ("content", "weight")})
            for token in self.tokenizer.added_tokens_decoder.values():
                if token.special and token.content in rest:
                    raise ValueError(f"message {at} spells the special token {token.content!r} outside of its content")

    def _template(self, chat_template):
        """The template of this call: its text, the name of one of the tokenizer's, or the processor's own; with the date."""
        named = self.tokenizer.chat_template
        if chat_template is not None and isinstance(named, dict) and chat_template in named:
            chat_template = named[chat_template]
        return dated_template(chat_template or self.chat_template, self.render_date)

    def _options(self, options):
        return {**self.chat_template_options, **options}

    def _image_ids(self, length):
        return [self.image_start_token_id, *[self.image_token_id] * length, self.image_end_token_id]

    def _pixels(self, images):
        """`pixel_values` and `num_tiles` of images (PIL, bytes, array, path or URL), or nothing where there are none."""
        return self.image_processor([_loaded(image) for image in images]) if images else {}

    def _run_lengths(self, counts, pixels):
        """Visual tokens of each image: the count once per tile."""
        return [count * number for count, number in zip(counts, pixels["num_tiles"].tolist())] if pixels else []

    def _batch(self, rows, pixels, return_tensors):
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        length = max(map(len, rows))
        data = {
            "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        }
        return BatchFeature({**data, **pixels}, tensor_type=return_tensors)


def missing_tokens(tokenizer, tokens):
    """Those of `tokens` that are not single tokens of `tokenizer`."""
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    return [
        token for token, index in zip(tokens, ids) if index is None or tokenizer.convert_ids_to_tokens(index) != token
    ]


def default_template(template):
    """The chat template itself, or of several by name the one that is named `default`, or the only one.

    Raises:
        ValueError: several, and none of them is the default.
    """
    if not isinstance(template, dict):
        return template
    if "default" not in template and len(template) != 1:
        raise ValueError(f"the tokenizer has the chat templates {sorted(template)} and none named 'default'; name one")
    return template.get("default", next(iter(template.values())))


def _image_of(item):
    """What an image item names its image by."""
    named = next(
        (item[key] for key in ("image", "path", "url", "image_url", "base64") if item.get(key) is not None), None
    )
    return named.get("url") if isinstance(named, dict) and "url" in named else named


def _loaded(image):
    """A file as its bytes, which are decoded as in training; a URL through transformers."""
    if isinstance(image, (str, Path)):
        return Path(image).read_bytes() if Path(image).is_file() else load_image(str(image))
    return image


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
        if kind not in ("text", "image", "image_url") or (kind == "text" and not isinstance(item.get("text"), str)):
            raise ValueError(f"a message holds an item of type {kind!r}; known are 'text' with its text, and 'image'")
    return [{**item, "type": "image"} if item["type"] == "image_url" else item for item in items]


def _flatten(images):
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for entry in images for image in (entry if isinstance(entry, (list, tuple)) else [entry])]
