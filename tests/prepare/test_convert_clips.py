"""Records with videos become samples that training reads: files as they are, lists of frames as images, the rest with a line."""

import json
import sys

import pytest
from clip_files import numbers, picture, png, shard, video

from tokenflex.data import Limits
from tokenflex.data.clips import with_frames
from tokenflex.data.scan import scan_shard
from tokenflex.errors import UserError
from tokenflex.model.video import clip_frames
from tokenflex.prepare.convert import Options, convert
from tokenflex.prepare.validate import validate

OPTIONS = Options(limits=Limits())


def told(question, **fields):
    return {**fields, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "x"}]}


def said(*items):
    return {
        "messages": [
            {"role": "user", "content": [*items, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "x"},
        ]
    }


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    for number in range(3):
        (folder / f"f{number}.png").write_bytes(png(picture(number)))
    return folder


def converted(records, media, tmp_path, name="llava"):
    """(content of each sample's question, the pictures that it shows, reasons of those left out)."""
    source, out = tmp_path / "data.jsonl", tmp_path / "out"
    source.write_text("\n".join(json.dumps(record) for record in records))
    tally = convert(name, source, out, options=OPTIONS, images=media)
    samples = []
    for path in sorted(out.glob("*.tar")):
        for scanned in scan_shard(path, Limits()):
            sample = with_frames(scanned.whole, clip_frames)
            samples.append((scanned.whole.messages[0]["content"], numbers_of(sample.images)))
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert tally.num_good == len(samples) and tally.num_skipped == len(lines)
    return samples, lines


def numbers_of(images):
    import io

    from PIL import Image

    return numbers([Image.open(io.BytesIO(image)) for image in images])


def test_lists_of_frames_in_every_dialect(media, tmp_path):
    frames = [f"f{number}.png" for number in range(3)]
    records = [
        told("<video>\nWhat?", video=frames),
        told("<image>\nWhat?", frames=frames),
        told("What?", videos=[frames[:2], frames[1:]]),
        said({"type": "video", "video": frames}),
        said({"type": "image", "image": "f0.png"}, {"type": "video", "frames": frames[1:]}),
        said({"type": "video_url", "video_url": {"url": frames[:1]}}),
    ]
    samples, skipped = converted(records, media, tmp_path)
    assert not skipped
    assert [shown for _, shown in samples] == [[0, 1, 2], [0, 1, 2], [0, 1, 1, 2], [0, 1, 2], [0, 1, 2], [0]]
    assert [[item["type"] for item in content] for content, _ in samples] == [
        ["video", "text"], ["video", "text"], ["video", "video", "text"], ["video", "text"], ["image", "video", "text"], ["video", "text"],
    ]  # fmt: skip
    assert len(validate(sorted((tmp_path / "out").glob("*.tar")), Limits())[1]) == 0


def test_what_is_no_clip_is_left_out_with_a_line(media, tmp_path):
    records = [
        told("<video>\nWhat?", video=[]),
        told("<video>\nWhat?", video=["f0.png", "none.png"]),
        said({"type": "video", "video": []}),
        said({"type": "video"}),
        told("<video>\nWhat?", video="https://host/a.mp4"),
        told("<video>\nWhat?", video="../a.mp4"),
        told("What?", audio="a.wav", video=["f0.png"]),
    ]
    samples, skipped = converted(records, media, tmp_path)
    assert not samples
    assert [line["reason"] for line in skipped] == [
        "clip",
        "image-missing",
        "clip",
        "image-tags",
        "image-path",
        "image-path",
        "media",
    ]
    assert all(line["detail"] and "\n" not in line["detail"] for line in skipped)


def test_files_keep_their_bytes_and_damaged_ones_are_left_out(media, tmp_path):
    (media / "a.mp4").write_bytes(video(9))
    (media / "b.webm").write_bytes(video(5, container="mkv"))
    (media / "c.mp4").write_bytes(video(9)[:300])
    records = [
        told("<video>\nWhat?", video="a.mp4"),
        said({"type": "video_url", "video_url": {"url": "b.webm"}}, {"type": "image", "image": "f2.png"}),
        told("<video>\nWhat?", video="c.mp4"),
        told("<video>\nWhat?", video="f0.png.mp4"),
    ]
    samples, skipped = converted(records, media, tmp_path)
    assert [shown for _, shown in samples] == [[0, 4, 8], [0, 4, 2]]
    assert samples[0][0][0]["video"] == (media / "a.mp4").read_bytes()
    assert [line["reason"] for line in skipped] == ["clip", "image-missing"]


def test_plain_shards_with_videos_and_captions(tmp_path, media):
    import tarfile

    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        for name, data in (("a.mp4", video(5)), ("a.txt", b"a square")):
            (media / name).write_bytes(data)
            tar.add(media / name, arcname=name)
    out = tmp_path / "out"
    tally = convert("webdataset", tmp_path / "plain.tar", out, options=OPTIONS)
    assert tally.num_good == 1
    (scanned,) = scan_shard(out / "shard-00000.tar", Limits())
    assert scanned.whole.messages[0]["content"][0]["type"] == "video"


def test_a_conversion_without_pyav_stops_with_what_to_install(media, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (media / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(40))
    with pytest.raises(UserError, match=r"pip install 'tokenflex\[video\]'"):
        converted([told("<video>\nWhat?", video="a.mp4")], media, tmp_path)
    path = shard(tmp_path / "s.tar", [(said({"type": "video"})["messages"], {"0.mp4": (media / "a.mp4").read_bytes()})])
    with pytest.raises(UserError, match=r"pip install 'tokenflex\[video\]'"):
        validate([path], Limits())
