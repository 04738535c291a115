"""One training sample: a conversation and its images, as it lies in a webdataset shard.

A sample is `<key>.json` and one image per image tag, `<key>.0.jpg`, `<key>.1.png`, ... The JSON holds `messages` (role and
content; content a string or a list of `{"type": "text", "text": ...}` and `{"type": "image"}` items), and optionally
`task` and `source`. A clip is an item `{"type": "video"}`, whose member is a video file (`<key>.0.mp4`), or `{"type": "video",
"frames": 4}`, whose members are the next four images.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import jinja2

from .problems import BadSample
from .processor import Encoded, Processor

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi")
ROLES = ("system", "user", "assistant")

Message = dict[str, Any]
"""`role`, and `content`: a list of text, image and video items; one of a video has its file's bytes, or a list of frames, as `video`."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A parsed sample; `images` are those of its image items, still encoded."""

    key: str
    messages: list[Message]
    images: list[bytes]
    task: str = ""
    source: str = ""

    def messages_with_images(self) -> list[Message]:
        """The messages with each image tag holding its encoded image, which the processor decodes as in training."""
        images = iter(self.images)
        return [
            {
                **message,
                "content": [
                    {**item, "image": next(images)} if item["type"] == "image" else item for item in message["content"]
                ],
            }
            for message in self.messages
        ]


def first_messages(sample: Sample, number: int) -> Sample:
    """The sample with its first `number` messages and their images."""
    messages = sample.messages[:number]
    images = sum(item["type"] == "image" for message in messages for item in message["content"])
    return replace(sample, messages=messages, images=sample.images[:images])


def parse_sample(members: dict[str, Any], where: object) -> Sample:
    """Members of one key, {extension: bytes} with `__key__`, -> `Sample`.

    Raises:
        BadSample: no or broken JSON, an unknown role or item, or another number of images than image tags.
    """
    key = members["__key__"]
    try:
        if "json" not in members:
            raise BadSample("no-json", f"has no .json member; wanted {key}.json with the messages")
        record = parse_record(members["json"], f"{key}.json")
        messages = [parse_message(message) for message in record["messages"]]
        messages, images = _with_members(messages, _members(members))
    except BadSample as problem:
        raise problem.located(where, key) from None
    return Sample(
        key=key,
        messages=messages,
        images=images,
        task=str(record.get("task", "")),
        source=str(record.get("source", "")),
    )


def parse_record(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object of a sample.

    Raises:
        BadSample: broken or too deep JSON, bytes that are not UTF-8, or no messages.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("json", f"{name} is not valid JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
        raise BadSample(
            "json", f"{name} holds no list of messages; wanted {{'messages': [{{'role': ..., 'content': ...}}]}}"
        )
    return record


def parse_message(message: Any) -> Message:
    """A message with its content as a list of items.

    Raises:
        BadSample: an unknown role or item, or text that cannot be written as UTF-8.
    """
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise BadSample("message", f"a message has the role {role!r:.80}; known are {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSample(
            "message", f"a message's content is a {type(content).__name__}; wanted a string or a list of items"
        )
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else item
        if kind not in ("text", "image", "video") or (kind == "text" and not isinstance(item.get("text"), str)):
            raise BadSample(
                "message",
                f"a message holds the item {item!r:.80}; wanted a text item with its text, an image item or a video item",
            )
        if kind == "video" and not _is_number(item.get("frames", 1)):
            raise BadSample(
                "clip", f"a video item has frames={item['frames']!r:.40}; wanted how many images are its frames"
            )
        if kind == "text" and not _is_utf8(item["text"]):
            raise BadSample(
                "message", "a message holds half a surrogate pair, which no tokenizer takes; repair the text"
            )
    shown = next((item["type"] for item in content if item["type"] != "text"), None)
    if message["role"] == "assistant" and shown:
        raise BadSample(
            "message",
            f"an assistant message holds {'an image' if shown == 'image' else 'a video'}; only text can be learned",
        )
    return {"role": message["role"], "content": content, **_weight(message)}


def encoded(processor: Processor, messages: list[Message], lengths: list[int]) -> Encoded:
    """The processor's tokens of a conversation, image i as a run of `lengths[i]`.

    Raises:
        BadSample: turns that the chat template refuses, or does not write as they are.
    """
    try:
        return processor.encode(messages, lengths)
    except jinja2.TemplateError as error:
        raise BadSample("message", f"the chat template refuses its turns ({error})") from None
    except ValueError as error:
        raise BadSample("template", str(error)) from None


def _weight(message: Message) -> Message:
    """`{"weight": 0}` for an answer that its `weight` or `loss` takes out of training, else nothing.

    Raises:
        BadSample: another weight than 0 or 1.
    """
    given = [message[key] for key in ("weight", "loss") if message.get(key) is not None]
    if any(not isinstance(value, (bool, int, float)) or value not in (0, 1) for value in given):
        raise BadSample("message", f"a message has the weight {given[0]!r:.40}; wanted 0 or 1")
    return {"weight": 0} if message["role"] == "assistant" and 0 in given else {}


def has_answer(messages: list[Message]) -> bool:
    """Whether there is assistant text to learn from, of which no weight of 0 says that it is context."""
    return any(
        item["type"] == "text" and item["text"].strip()
        for message in messages
        if message["role"] == "assistant" and message.get("weight") != 0
        for item in message["content"]
    )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _with_members(messages: list[Message], members: list[tuple[bytes, bool]]) -> tuple[list[Message], list[bytes]]:
    """(messages, video items with their file or frames; the images of image items) from members (bytes, whether it is a video)."""
    items = [item for message in messages for item in message["content"] if item["type"] != "text"]
    tags = sum(item.get("frames", 1) if item["type"] == "video" else 1 for item in items)
    has_clips = any(item["type"] == "video" for item in items)
    if tags != len(members):
        of_what = "tags of images, videos and their frames" if has_clips else "image tags"
        detail = (
            f"the messages have {tags} {of_what} but the sample has {len(members)} images; each image needs one tag"
        )
        raise BadSample("image-tags", detail)
    following, images, clips = iter(members), [], []
    for item in items:
        is_file = item["type"] == "video" and "frames" not in item
        own = [next(following) for _ in range(item.get("frames", 1) if item["type"] == "video" else 1)]
        if any(is_video != is_file for _, is_video in own):
            came, wanted = ("an image", "a video file") if is_file else ("a video file", "an image")
            raise BadSample(
                "clip",
                f"where a message wants {wanted} the sample has {came}; number members in the order of the items",
            )
        if item["type"] == "image":
            images.append(own[0][0])
        else:
            clips.append(own[0][0] if is_file else [data for data, _ in own])
    if not clips:
        return messages, images
    shown = iter(clips)
    filled = lambda item: {"type": "video", "video": next(shown)} if item["type"] == "video" else item  # noqa: E731
    return [{**message, "content": [filled(item) for item in message["content"]]} for message in messages], images


def _members(members: dict[str, Any]) -> list[tuple[bytes, bool]]:
    """The encoded images and video files in the order of their numbers, and whether each is a video."""
    numbered: dict[int, tuple[bytes, bool]] = {}
    for extension, data in members.items():
        number, _, kind = extension.rpartition(".")
        if kind.lower() in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS):
            if number and not (number.isascii() and number.isdigit()):
                raise BadSample(
                    "image-number",
                    f"member .{extension} has no number; name images .0.jpg, .1.jpg, ... in the order of their tags",
                )
            place = int(number or 0)
            if place in numbered:
                raise BadSample("image-number", f"image {place} comes twice, as .{extension} and by another name")
            numbered[place] = data, kind.lower() in VIDEO_EXTENSIONS
    if sorted(numbered) != list(range(len(numbered))):
        raise BadSample(
            "image-number",
            f"images are numbered {sorted(numbered)}; wanted 0 to {len(numbered) - 1} without gaps",
        )
    return [numbered[number] for number in sorted(numbered)]
