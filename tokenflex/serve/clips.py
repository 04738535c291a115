"""Videos of a request as the frames that the model is shown, within limits.

They are decoded when the request's turn has come, so that no more than one request's frames are in memory.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import ProcessorMixin

from ..infer import Count
from ..model.video import ClipRefused, PyAVMissing, clip_frames
from .limits import RequestRefused, ServeLimits
from .requests import ChatRequest


def with_frames(
    request: ChatRequest, processor: ProcessorMixin, limits: ServeLimits, is_over: Callable[[], bool]
) -> ChatRequest:
    """A request in which every video has become its frames, as images; in a list of counts a video's has become each frame's.

    Frames are sampled as `processor` says. Once `is_over` says so nothing more is decoded.

    Raises:
        RequestRefused: a video that does not decode, or not in time; too many or too large frames; no PyAV here.
    """
    end = time.monotonic() + limits.max_decode_seconds
    counts = request.num_visual_tokens
    entries, of_frames = iter(counts if isinstance(counts, list) else ()), list[Count]()
    messages, num_frames = [], 0
    for at, message in enumerate(request.messages):
        content: list[dict[str, Any]] = []
        for number, item in enumerate(message["content"]):
            shown = [item]
            if item["type"] == "video":
                where = f"messages[{at}].content[{number}]"
                shown = _frames(item["video"], where, processor, limits, lambda: is_over() or time.monotonic() > end)
                num_frames += len(shown)
                if num_frames > limits.max_frames:
                    raise _refused(
                        where, f"{num_frames} frames up to here; all videos have at most {limits.max_frames}"
                    )
            content += shown
            if isinstance(counts, list) and item["type"] != "text":
                of_frames += [next(entries)] * len(shown)
        messages.append({**message, "content": content})
    return replace(request, messages=messages, num_visual_tokens=of_frames if isinstance(counts, list) else counts)


def _frames(
    video: bytes, where: str, processor: ProcessorMixin, limits: ServeLimits, is_over: Callable[[], bool]
) -> list[dict[str, Any]]:
    """The frames of a video as image items."""
    try:
        frames = clip_frames(video, processor.frames_per_second, processor.max_frames, limits.max_frame_pixels, is_over)
    except PyAVMissing:
        raise _refused(
            where, "videos are not read here, PyAV is missing (pip install 'tokenflex[video]'); send frames as images"
        ) from None
    except ClipRefused as problem:
        if is_over():
            why = f"decoding the videos took more than {limits.max_decode_seconds:g} s, or the request's time is up; send less"
            raise _refused(where, why) from None
        raise _refused(where, str(problem)) from None
    return [{"type": "image", "image": frame} for frame in frames]


def _refused(where: str, why: str) -> RequestRefused:
    return RequestRefused(f"{where}.video_url: {why}", param=where, code="invalid_video")
