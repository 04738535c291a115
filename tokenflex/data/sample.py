"""One training sample: a conversation and its images, as it lies in a webdataset shard.

A sample is `<key>.json` and one image per image tag, `<key>.0.jpg`, `<key>.1.png`, ... The JSON holds `messages` (role and
content; content a string or a list of `{"type": "text", "text": ...}` and `{"type": "image"}` items), and optionally
`task` and `source`.
"""

import io
import json
from dataclasses import dataclass, replace

from PIL import Image

from ..errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A parsed sample; `images` are still encoded."""

    key: str
    messages: list
    images: list
    task: str = ""
    source: str = ""

    def decoded_messages(self):
        """The messages with each image tag holding its decoded image.

        Raises:
            UserError: an image that cannot be decoded.
        """
        decoded = iter([decode_image(data, f"sample {self.key}, image {i}") for i, data in enumerate(self.images)])
        return [
            {
                **message,
                "content": [
                    {**item, "image": next(decoded)} if item["type"] == "image" else item for item in message["content"]
                ],
            }
            for message in self.messages
        ]


def first_messages(sample, number):
    """The sample with its first `number` messages and their images."""
    messages = sample.messages[:number]
    images = sum(item["type"] == "image" for message in messages for item in message["content"])
    return replace(sample, messages=messages, images=sample.images[:images])


def decode_image(data, where):
    """Encoded bytes -> PIL image, fully read.

    Raises:
        UserError: not an image, truncated, or larger than PIL's limit against decompression bombs.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{where}: not a readable image ({error}); wanted a JPEG, PNG or WebP file; repair or remove the sample"
        ) from None
    return image


def parse_sample(members, where):
    """Members of one key, {extension: bytes} with `__key__`, -> `Sample`.

    Raises:
        UserError: no or broken JSON, an unknown role or item, or another number of images than image tags.
    """
    key = members["__key__"]
    where = f"{where}, sample {key}"
    if "json" not in members:
        raise UserError(f"{where}: has no .json member; wanted {key}.json with the messages")
    try:
        record = json.loads(members["json"])
    except ValueError as error:
        raise UserError(f"{where}: {key}.json is not valid JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
        raise UserError(
            f"{where}: {key}.json holds no list of messages; wanted {{'messages': [{{'role': ..., 'content': ...}}]}}"
        )
    messages = [_message(message, where) for message in record["messages"]]
    images = _images(members, where)
    tags = sum(item["type"] == "image" for message in messages for item in message["content"])
    if tags != len(images):
        raise UserError(
            f"{where}: the messages have {tags} image tags but the sample has {len(images)} images; each image needs one tag"
        )
    return Sample(
        key=key,
        messages=messages,
        images=images,
        task=str(record.get("task", "")),
        source=str(record.get("source", "")),
    )


def _message(message, where):
    """A message with its content as a list of items."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise UserError(f"{where}: a message has the role {role!r}; known are {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise UserError(
            f"{where}: a message's content is a {type(content).__name__}; wanted a string or a list of items"
        )
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else item
        if kind not in ("text", "image") or (kind == "text" and not isinstance(item.get("text"), str)):
            raise UserError(
                f"{where}: a message holds the item {item!r:.80}; wanted a text item with its text, or an image item"
            )
    return {"role": message["role"], "content": content}


def _images(members, where):
    """The encoded images in the order of their numbers."""
    numbered = {}
    for extension, data in members.items():
        number, _, kind = extension.rpartition(".")
        if kind.lower() in IMAGE_EXTENSIONS:
            if number and not number.isdigit():
                raise UserError(
                    f"{where}: member .{extension} has no number; name images .0.jpg, .1.jpg, ... in the order of their tags"
                )
            numbered[int(number or 0)] = data
    if sorted(numbered) != list(range(len(numbered))):
        raise UserError(
            f"{where}: images are numbered {sorted(numbered)}; wanted 0 to {len(numbered) - 1} without gaps"
        )
    return [numbered[number] for number in sorted(numbered)]
