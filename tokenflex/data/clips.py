"""Clips of a sample become images when it is read: headers, tiles, lengths and packs then know nothing but images."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from PIL import Image

from ..errors import UserError
from .problems import BadSample
from .sample import Message, Sample

FramesOf = Callable[[Any], list[Any]]
"""A clip, as `parse_sample` has it, -> its frames as encoded bytes or arrays [H, W, 3]; `TokenFlexProcessor.frames` is one."""


def with_frames(sample: Sample, frames_of: FramesOf) -> Sample:
    """The sample with an image item for each frame of its video items, and the frames among its images.

    Frames of a file are written as PNG, which loses nothing: a training sample and a prompt with the same file have the same pixels.

    Raises:
        BadSample: a clip that does not decode, is empty or has too many frames. UserError: PyAV is missing.
    """
    if not any(item["type"] == "video" for message in sample.messages for item in message["content"]):
        return sample
    given, images, messages = iter(sample.images), list[bytes](), list[Message]()
    number = 0
    for message in sample.messages:
        content: list[dict[str, Any]] = []
        for item in message["content"]:
            if item["type"] == "image":
                images.append(next(given))
            if item["type"] != "video":
                content.append(item)
                continue
            frames = _frames(item["video"], number, frames_of)
            number += 1
            images += frames
            content += [{"type": "image"}] * len(frames)
        messages.append({**message, "content": content})
    return replace(sample, messages=messages, images=images)


def _frames(clip: Any, number: int, frames_of: FramesOf) -> list[bytes]:
    try:
        frames = frames_of(clip)
    except ImportError as error:  # no fault of the sample: every one with a video file would be lost
        raise UserError(f"data: {error}") from None
    except ValueError as error:
        raise BadSample("clip", f"video {number}: {error}") from None
    return [frame if isinstance(frame, bytes) else _as_png(frame) for frame in frames]


def _as_png(frame: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", compress_level=1)
    return file.getvalue()
