"""Clips as frames: a small video file, sampled at a rate, or a list of frames that somebody else has sampled.

One rule for training and inference, so that the frames of a file, and with them all lengths, are the same in both. Travels with
every exported model, so it imports nothing but numpy; PyAV is asked for when the first video file comes.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FRAMES_PER_SECOND, MAX_FRAMES = 1.0, 16
MAX_DECODED = 36_000
"""Frames that a file may hold up to the last one that is taken: 20 minutes at 30 per second. All of them are decoded."""
MAX_PIXELS = 100_000_000
_MARGIN = 2**20
"""Pixels beside twice the limit that a decoder may allocate: it rounds sides up to blocks and keeps margins around a frame."""
_CONTAINERS = ((4, b"ftyp", "mp4"), (0, b"\x1aE\xdf\xa3", "matroska"), (8, b"AVI ", "avi"))
"""Where which bytes tell which container; no other is opened, since some (playlists) name further files to be read."""


class ClipRefused(ValueError):
    """A clip that cannot be used; its text says what came and what was wanted."""


class PyAVMissing(ImportError, ClipRefused):
    """A video file came where PyAV is not installed."""


def clip_frames(
    clip: object,
    frames_per_second: float = FRAMES_PER_SECOND,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
    is_over: Callable[[], bool] = lambda: False,
) -> list[Any]:
    """The frames of a clip, as images.

    Args:
        clip: bytes or the path of a video file (MP4 or MOV, WebM or Matroska, AVI), or its frames: a list of images or an array [frames,
            H, W, 3], which are taken as they are.
        frames_per_second, max_frames: of a file, `sampled`; of a list `max_frames` is the most that are taken.
        max_pixels: of a frame of a file, by its header.
        is_over: asked while a file is decoded, before each frame; once it says so, the file is refused.

    Returns:
        For a file arrays [H, W, 3] of bytes, upright; else the list.

    Raises:
        ClipRefused: no frame, a list of more than `max_frames`, or a file that does not decode. PyAVMissing: a file, and no PyAV.
    """
    if isinstance(clip, (list, tuple, np.ndarray)):
        if not len(clip):
            raise ClipRefused("an empty clip: it has no frame; wanted at least one")
        if len(clip) > max_frames:
            raise ClipRefused(
                f"{len(clip)} frames, at most {max_frames} are taken (max_frames); give fewer, or raise it"
            )
        return list(clip)
    if isinstance(clip, (str, Path)):
        if str(clip).startswith(("http://", "https://", "data:")):
            raise ClipRefused(
                f"{str(clip)[:60]!r} is an address; wanted the path of a video file, its bytes or its frames"
            )
        clip = Path(clip).read_bytes()
    if not isinstance(clip, (bytes, bytearray, memoryview)):
        raise ClipRefused(
            f"a clip came as {type(clip).__name__}; wanted a video file's path or bytes, or a list of frames"
        )
    return decoded(bytes(clip), frames_per_second, max_frames, max_pixels, is_over)


def sampled(times: Sequence[float], frames_per_second: float, max_frames: int) -> list[int]:
    """Which frames of a video are taken, by their times in seconds, ascending: places in `times`.

    At 0, 1 / rate, 2 / rate, ... after the first frame, the frame that is shown then; each once. If these are more than
    `max_frames`, as many of them, spread evenly from the first to the last.
    """
    if not times:
        return []
    # the first tick of the rate that does not come before each frame; a frame is shown at those before its successor's
    ticks = [math.ceil((time - times[0]) * frames_per_second - 1e-6) for time in times]
    ends = [*ticks[1:], math.floor((times[-1] - times[0]) * frames_per_second + 1e-6) + 1]
    places = [place for place, (tick, end) in enumerate(zip(ticks, ends)) if tick < end]
    if len(places) > max_frames:
        places = [places[place] for place in np.linspace(0, len(places) - 1, max_frames).round().astype(int)]
    return places


def decoded(
    data: bytes, frames_per_second: float, max_frames: int, max_pixels: int, is_over: Callable[[], bool]
) -> list[np.ndarray]:
    """The sampled frames of a video file: arrays [H, W, 3] of bytes, turned as the file says.

    Raises:
        ClipRefused: another container, no frame, too many, too large ones, one that does not decode, or broken off. PyAVMissing.
    """
    av = _pyav()
    container = container_of(data)
    try:
        with av.open(io.BytesIO(data), format=container) as file:
            codec = file.streams.video[0].codec_context if file.streams.video else None
            if codec is None:
                raise ClipRefused("a file without a video stream that can be decoded; repair or remove it")
            if codec.width * codec.height > max_pixels:
                raise ClipRefused(
                    f"frames of {codec.width} x {codec.height} pixels, at most {max_pixels} are allowed; shrink it"
                )
            wanted = sampled(_times(file, is_over), frames_per_second, max_frames)
        if not wanted:
            raise ClipRefused("an empty clip: the file has no frame; wanted at least one")
        if wanted[-1] >= MAX_DECODED:
            raise ClipRefused(
                f"{wanted[-1] + 1} frames have to be decoded, at most {MAX_DECODED} are; cut the video into shorter ones"
            )
        with av.open(io.BytesIO(data), format=container) as file:  # anew: not every container can be wound back
            # a frame may be larger than the header says
            file.streams.video[0].codec_context.options = {"max_pixels": str(2 * max_pixels + _MARGIN)}
            frames = _taken(file, set(wanted), is_over)
    except (av.FFmpegError, ValueError, OSError, MemoryError) as error:
        if isinstance(error, ClipRefused):
            raise
        raise ClipRefused(
            f"not a readable video ({' '.join(str(getattr(error, 'strerror', None) or error).split())}); repair or remove it"
        ) from None
    if len(frames) != len(wanted):
        raise ClipRefused(
            f"only {len(frames)} of the {len(wanted)} frames that are taken decode: it is cut short or damaged; repair or remove it"
        )
    return frames


def container_of(data: bytes) -> str:
    """The container of a video file, by its first bytes: `mp4`, `matroska` or `avi`.

    Raises:
        ClipRefused: it is none of these.
    """
    for at, signature, name in _CONTAINERS:
        if data[at : at + len(signature)] == signature:
            return name
    raise ClipRefused(
        f"not a readable video (begins with {data[:8]!r}); wanted an MP4, MOV, WebM, Matroska or AVI file"
    )


def _pyav():
    try:
        import av
    except ImportError:
        raise PyAVMissing(
            "a video file needs PyAV, which is not installed: pip install 'tokenflex[video]' (or av), or give the clip as frames"
        ) from None
    return av


def _times(file, is_over):
    """When each frame of the first video stream is shown, in seconds and in order; nothing is decoded for it."""
    stream = file.streams.video[0]
    stamps = [
        packet.pts if packet.pts is not None else packet.dts
        for packet in _until(is_over, file.demux(stream))
        if packet.size and not packet.is_discard
    ]
    if None in stamps:  # a stream that stamps no frame shows them at its rate
        return [place / float(stream.average_rate or 25) for place in range(len(stamps))]
    return sorted(float(stamp * stream.time_base) for stamp in stamps)


def _taken(file, wanted, is_over):
    """The frames at the places `wanted`, in the order that they are shown in."""
    frames = []
    for place, frame in enumerate(_until(is_over, file.decode(video=0))):
        if place in wanted:
            frames.append(np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)))
        if place >= max(wanted):
            break
    return frames


def _until(is_over: Callable[[], bool], parts: Iterable[Any]) -> Iterator[Any]:
    for part in parts:
        if is_over():
            raise ClipRefused("decoding it was broken off; cut the video into shorter ones, or shrink it")
        yield part
