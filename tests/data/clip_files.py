"""Clips for tests: pictures of one colour, files of them, shards of samples, and digits that move."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

CONTAINERS = {"mp4": "mpeg4", "mkv": "mpeg4", "avi": "mpeg4"}


def picture(number, size=(40, 32)):
    """A frame of one colour by its number, which survives compression."""
    return np.full((size[1], size[0], 3), (20 + 10 * number) % 250, np.uint8)


def video(number, rate=4, container="mp4", size=(40, 32)):
    """A file of the first `number` pictures."""
    return encoded_video([picture(place, size) for place in range(number)], rate, container)


def encoded_video(frames, rate, container="mp4"):
    """A file of frames [H, W, 3]."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format={"mkv": "matroska"}.get(container, container)) as out:
        stream = out.add_stream(CONTAINERS[container], rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def shard(path, samples):
    """A tar of (messages, members by number and extension, perhaps other fields)."""
    with tarfile.open(path, "w") as tar:
        for place, (messages, members, *fields) in enumerate(samples):
            record = json.dumps({"messages": messages, **dict(*fields)}).encode()
            for name, data in (("json", record), *members.items()):
                info = tarfile.TarInfo(f"s{place:03d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def talk(*items, answer="a"):
    return [
        {"role": "user", "content": [*items, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": answer},
    ]


def numbers(frames):
    """Which pictures frames are."""
    return [round((float(np.asarray(frame).mean()) - 20) / 10) for frame in frames]


WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def moving_digit(glyph, way, rng, frames=4, size=(48, 64), step=6):
    """A digit [24, 24] that moves by `step` pixels a frame over black: arrays [H, W, 3]; its place says nothing of its way."""
    height, width = size
    middle = [rng.integers(step * frames // 2, room - 24 - step * frames // 2 + 1) for room in size]
    clip = []
    for place in range(frames):
        shift = [int(m + w * step * (place - (frames - 1) / 2)) for m, w in zip(middle, WAYS[way])]
        frame = np.zeros((height, width, 3), np.uint8)
        frame[shift[0] : shift[0] + 24, shift[1] : shift[1] + 24] = glyph[..., None]
        clip.append(frame)
    return clip


def moving_shard(path, number, split, seed, as_files=False):
    """A shard of clips of four frames: which digit is it, or which way does it move; half of them files where `as_files`."""
    from tokenflex.corpus.glyphs import load_sources

    glyphs, rng, samples = load_sources(split).glyphs, np.random.default_rng(seed), []
    for place in range(number):
        digit, way = int(rng.integers(10)), list(WAYS)[rng.integers(4)]
        frames = moving_digit(glyphs[digit][rng.integers(len(glyphs[digit]))], way, rng)
        asks_way = bool(rng.integers(2))
        item, members = {"type": "video", "frames": 4}, {f"{i}.png": png(frame) for i, frame in enumerate(frames)}
        if as_files and place % 2:
            item, members = {"type": "video"}, {"0.mp4": encoded_video(frames, rate=1)}
        question, answer = ("which way", str(list(WAYS).index(way))) if asks_way else ("which digit", str(digit))
        messages = [
            {"role": "user", "content": [item, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
        samples.append((messages, members, {"task": "way" if asks_way else "digit"}))
    return shard(path, samples)
