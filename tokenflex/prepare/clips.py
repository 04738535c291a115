"""Clips where no recipe says how they are sampled: by the defaults of one, which is enough to see whether they decode."""

from typing import Any

from ..data.problems import BadSample
from ..errors import UserError


def frames_of(clip: bytes | list[bytes]) -> list[Any]:
    """The frames of a clip at a recipe's default sampling; see `tokenflex.model.video.clip_frames`."""
    from ..model.video import clip_frames  # with transformers behind it, which a data set of images does not need

    return clip_frames(clip, max_frames=max(len(clip), 1)) if isinstance(clip, list) else clip_frames(clip)


def checked_video(data: bytes) -> tuple[bytes, str]:
    """(bytes, extension) of a video file whose frames decode.

    Raises:
        BadSample: they do not. UserError: PyAV is missing.
    """
    from ..model.video import container_of

    try:
        frames_of(data)
        return data, {"matroska": "mkv"}.get(container_of(data), container_of(data))
    except ImportError as error:
        raise UserError(f"data convert: {error}") from None
    except ValueError as error:
        raise BadSample("clip", f"a video: {error}") from None
