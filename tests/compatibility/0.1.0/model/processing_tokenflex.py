"""Conversations and images to model inputs; one rendering for training, evaluation and inference.

Special tokens enter by id only: the chat template is rendered around stand-ins for the messages' content, and the content
itself is tokenized apart with special tokens switched off. So text like `<|im_end|>` or `<img>` in a user's message is
just text, and it works with the chat template of any language model.

Travels with every exported model, so it imports nothing but torch, transformers and its siblings.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

from .pooling import sides_of

STAND_IN = re.compile("\ue000(\\d+)\ue001")  # private-use characters: no template writes them


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

    Raises:
        ValueError: the tokenizer lacks one of the three tokens.
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
        self._template_cache = {}
        self.image_start_token, self.image_token, self.image_end_token = tokens
        self.image_start_token_id, self.image_token_id, self.image_end_token_id = tokenizer.convert_tokens_to_ids(
            list(tokens)
        )
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

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
            tag = self.image_start_token + self.image_token + self.image_end_token + "\n"
            texts = []
            for messages in conversations:
                rendered, contents = self._render(messages, add_generation_prompt, chat_template, **kwargs)
                text = lambda items: "".join(tag if item["type"] == "image" else item["text"] for item in items)  # noqa: E731
                texts.append(STAND_IN.sub(lambda match: text(contents[int(match[1])]), rendered))  # noqa: B023
            return texts if is_batch else texts[0]
        images = [
            [_image_of(item) for message in messages for item in _items(message) if item["type"] == "image"]
            for messages in conversations
        ]
        pixels = self._pixels([image for some in images for image in some])
        lengths = self._run_lengths(self.counts(num_visual_tokens, sum(map(len, images))), pixels)
        rows = []
        for messages, some in zip(conversations, images):
            encoded = self.encode(messages, lengths[: len(some)], add_generation_prompt, chat_template, **kwargs)
            lengths = lengths[len(some) :]
            rows.append(encoded.input_ids)
        batch = self._batch(rows, pixels, return_tensors)
        return batch if return_dict else batch["input_ids"]

    def encode(self, messages, lengths, add_generation_prompt=False, chat_template=None, **kwargs):
        """One conversation -> `EncodedConversation`, image i as a run of `lengths[i]` placeholders (0 is allowed: no run).

        A run is as long as the image's visual tokens: its count times its tiles.

        Learned are the assistant's content and the token that ends its turn.

        Raises:
            ValueError: not as many lengths as images.
        """
        rendered, contents = self._render(messages, add_generation_prompt, chat_template, **kwargs)
        num_images = sum(item["type"] == "image" for items in contents for item in items)
        if num_images != len(lengths):
            raise ValueError(
                f"the conversation has {num_images} image tags but {len(lengths)} images; each image needs one tag"
            )
        texts = [item["text"] for items in contents for item in items if item["type"] == "text"]
        text_ids = iter(
            self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []
        )
        encoded = EncodedConversation([], [], [], [])
        lengths, after_answer = iter(lengths), False
        for index, piece in enumerate(STAND_IN.split(rendered)):
            if index % 2:  # a message's content
                after_answer = messages[int(piece)]["role"] == "assistant"
                for item in contents[int(piece)]:
                    if item["type"] == "image":
                        encoded.image_starts.append(len(encoded.input_ids) + 1)
                        encoded.images.append(_image_of(item))
                        encoded.extend(self._image_ids(next(lengths)) + self._template_ids("\n"))
                    else:
                        encoded.extend(next(text_ids), is_target=after_answer)
            else:
                first, rest = self._template_ids(piece)[:1], self._template_ids(piece)[1:]
                encoded.extend(first, is_target=after_answer)
                encoded.extend(rest)
        return encoded

    def _template_ids(self, piece):
        """Tokens of a piece of the chat template; there are few of them, so they are kept."""
        if piece not in self._template_cache:
            self._template_cache[piece] = self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
        return self._template_cache[piece]

    def _render(self, messages, add_generation_prompt, chat_template, **kwargs):
        """The chat template around stand-ins, and each message's content as a list of items."""
        contents = [_items(message) for message in messages]
        stand_ins = [{**message, "content": f"\ue000{index}\ue001"} for index, message in enumerate(messages)]
        rendered = self.tokenizer.apply_chat_template(
            stand_ins,
            chat_template=chat_template or self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **kwargs,
        )
        return rendered, contents

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


def _image_of(item):
    """What an image item names its image by."""
    return next((item[key] for key in ("image", "path", "url") if key in item), None)


def _loaded(image):
    """A file as its bytes, which are decoded as in training; a URL through transformers."""
    if isinstance(image, (str, Path)):
        return Path(image).read_bytes() if Path(image).is_file() else load_image(str(image))
    return image


def _items(message):
    """A message's content as a list of text and image items."""
    content = message["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    for item in content:
        if item.get("type") not in ("text", "image"):
            raise ValueError(f"a message holds an item of type {item.get('type')!r}; known are 'text' and 'image'")
    return content


def _flatten(images):
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for entry in images for image in (entry if isinstance(entry, (list, tuple)) else [entry])]
