"""Clips: files and lists of frames become images by one rule, the same when indexed, trained on and asked about."""

import io
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from clip_files import CONTAINERS, numbers, picture, png, shard, talk, video
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenflex.budget import VisualTokenBudget
from tokenflex.config import BudgetConfig, DataConfig
from tokenflex.data import BadSample, Limits, PackDataset, load_or_build_index
from tokenflex.data.clips import with_frames
from tokenflex.data.index import fingerprint
from tokenflex.data.loader import MicroBatchPlan
from tokenflex.data.sample import Sample
from tokenflex.errors import UserError
from tokenflex.model import build_processor
from tokenflex.model.video import ClipRefused, PyAVMissing, clip_frames, container_of, sampled
from tokenflex.plan import Planner, Position
from tokenflex.train.objective import model_inputs


@given(
    gaps=st.lists(st.integers(1, 40), min_size=0, max_size=60),
    rate=st.sampled_from([0.25, 1, 2, 7.5, 30]),
    most=st.integers(1, 20),
)
@example(gaps=[1] * 12 + [15] + [40] * 17, rate=30, most=1)  # longer than a minute, at the highest rate
@settings(max_examples=200, deadline=None)
def test_sampled_frames_are_those_shown_at_the_rate_and_never_more(gaps, rate, most):
    times = np.cumsum([3, *gaps]) / 10
    places = sampled(times.tolist(), rate, most)
    every = sampled(times.tolist(), rate, 10**6)
    assert places[0] == 0 and places == sorted(set(places)) and len(places) == min(most, len(every))
    by_hand = {
        max(i for i, time in enumerate(times) if time <= 0.3 + step / rate + 1e-6)
        for step in range(int(rate * times[-1]) + 2)
        if step / rate <= times[-1] - 0.3 + 1e-6
    }
    assert set(every) == by_hand and set(places) <= by_hand
    assert most == 1 or places[-1] == every[-1]
    assert sampled([], rate, most) == []


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_is_sampled_at_the_rate_in_every_container(container):
    data = video(13, rate=4, container=container)  # 3.25 s
    assert numbers(clip_frames(data, 1.0, 16)) == [0, 4, 8, 12]
    assert numbers(clip_frames(data, 2.0, 16)) == [0, 2, 4, 6, 8, 10, 12]
    assert numbers(clip_frames(data, 4.0, 3)) == [0, 6, 12]
    assert numbers(clip_frames(data, 100.0, 100)) == list(range(13))
    assert all(frame.shape == (32, 40, 3) and frame.dtype == np.uint8 for frame in clip_frames(data))


def test_bad_files_are_refused_in_one_line(tmp_path, monkeypatch):
    data = video(13)
    cut = video(40, rate=4, container="mkv", size=(160, 128))
    wrong = {
        "begins with b'#EXTM3U": b"#EXTM3U\nhttp://127.0.0.1/secret.ts\n",
        "begins with b''": b"",
        "not a readable video": data[:200],
        "are allowed": data,
    }
    for part, broken in wrong.items():
        with pytest.raises(ClipRefused, match=part) as raised:
            clip_frames(broken, max_pixels=1000 if broken is data else 10**6)
        assert "\n" not in str(raised.value)
    flipped = bytearray(data)
    flipped[40 : len(data) // 2] = bytes(len(data) // 2 - 40)
    with pytest.raises(ClipRefused):
        clip_frames(bytes(flipped))
    monkeypatch.setattr("tokenflex.model.video.MAX_DECODED", 9)
    with pytest.raises(ClipRefused, match="frames have to be decoded, at most 9"):
        clip_frames(cut, 4.0, 16)


def test_a_damaged_file_never_ends_otherwise(tmp_path):
    """Bytes lost or flipped anywhere: frames, or a refusal of one line."""
    data, rng = video(9, container="mp4"), np.random.default_rng(0)
    outcomes = set()
    for _ in range(40):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 6):
            broken[place] = rng.integers(0, 256)
        broken = bytes(broken[: rng.integers(1, len(data) + 1)]) if rng.random() < 0.3 else bytes(broken)
        try:
            outcomes.add(len(clip_frames(broken)) > 0)
        except ClipRefused as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {True, "refused"}


def test_a_frame_larger_than_its_header_says_is_not_decoded():
    """A stream of JPEGs, of which each says its own size: the third is 1,500 times as large as the header's."""
    import av

    def frame(stream, size):
        (packet,) = stream.encode(av.VideoFrame.from_ndarray(picture(1, size), format="rgb24"))
        return bytes(packet)

    file, large = io.BytesIO(), av.CodecContext.create("mjpeg", "w")
    large.width, large.height, large.pix_fmt, large.time_base = 1600, 1200, "yuvj420p", Fraction(1, 4)
    with av.open(file, "w", format="avi") as out:
        stream = out.add_stream("mjpeg", rate=4)
        stream.width, stream.height, stream.pix_fmt = 40, 32, "yuvj420p"
        for place in range(4):
            packet = av.Packet(frame(large, (1600, 1200)) if place == 2 else frame(stream, (40, 32)))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, place, place, Fraction(1, 4)
            out.mux(packet)
    assert [len(image) for image in clip_frames(file.getvalue(), 4.0)] == [32, 32, 1200, 32]
    with pytest.raises(ClipRefused, match="not a readable video"):
        clip_frames(file.getvalue(), 4.0, max_pixels=10_000)


def test_decoding_is_broken_off_when_it_shall_be():
    """Asked before each of 13 packets and each of 13 frames, and at none of these times is there a way around it."""
    data, asked = video(13), []
    assert len(clip_frames(data, is_over=lambda: asked.append(0))) == 4 and len(asked) >= 26
    for at in (1, 13, 20, len(asked)):
        answers = iter([False] * (at - 1) + [True])
        with pytest.raises(ClipRefused, match="broken off"):
            clip_frames(data, is_over=lambda answers=answers: next(answers))


def test_lists_of_frames_are_taken_as_they_are_or_refused():
    frames = [picture(i) for i in range(3)]
    assert clip_frames(frames) == frames and clip_frames(tuple(frames)) == frames
    assert len(clip_frames(np.stack(frames))) == 3
    for clip, part in (
        ([], "empty clip"),
        ([b""] * 17, "17 frames, at most 16"),
        (None, "came as NoneType"),
        ("https://x/y.mp4", "is an address"),
    ):
        with pytest.raises(ClipRefused, match=part):
            clip_frames(clip)
    with pytest.raises(FileNotFoundError):
        clip_frames("none.mp4")
    assert container_of(b"\0\0\0\x20ftypisom") == "mp4"


def test_without_pyav_a_file_is_refused_with_what_to_install(monkeypatch, processor):
    monkeypatch.setitem(sys.modules, "av", None)
    clip = b"\0\0\0\x20ftypisom"
    prompt = talk({"type": "video", "video": clip})
    assert clip_frames([1, 2]) == [1, 2]
    for kind, call in (
        (PyAVMissing, lambda: clip_frames(clip)),
        (PyAVMissing, lambda: processor.apply_chat_template(prompt, tokenize=True)),
        (UserError, lambda: with_frames(Sample(key="a", messages=prompt, images=[]), processor.frames)),
    ):
        with pytest.raises(kind, match=r"pip install 'tokenflex\[video\]'") as raised:
            call()
        assert "\n" not in str(raised.value)
        assert not isinstance(raised.value, BadSample)  # no fault of a sample, so none is left out for it


@pytest.fixture
def clips(tmp_path):
    """A shard with a file, a list of frames beside an image, and text; a second turn with another clip."""
    frames = {f"{i}.png": png(picture(i)) for i in range(4)}
    two_turns = talk({"type": "video", "frames": 2}) + talk(
        {"type": "image"}, {"type": "video", "frames": 1}, answer="b"
    )
    samples = [(talk({"type": "video", "frames": 4}), frames), (two_turns, frames), (talk(), {})]
    return shard(tmp_path / "clips.tar", samples)


def test_the_index_has_what_the_loader_makes_and_a_pack_answers_as_its_prompts(clips, tmp_path, processor, model):
    """Planned length = collated length for every sample; packed = each alone, as the chat template's video item renders it."""
    index = load_or_build_index([clips], processor, tmp_path / "index", Limits())
    assert index.num_images.tolist() == [4, 4, 0] and index.cuts[:, 1].tolist() == [2]
    dataset = PackDataset(index, processor, "token", blank_count=4, limits=Limits())
    counts = np.array([4, 12, 0])
    batch = dataset.batch(MicroBatchPlan(Position(), True, np.arange(3), counts, 1.0))
    assert not batch.skipped
    assert batch.cu_seq_lens.diff().tolist() == (index.text_tokens.astype(int) + index.num_tiles * counts).tolist()
    cut = dataset.prepared(1, 12, 2)[0]
    assert len(cut.tiles) == 2 and len(cut.input_ids) == int(index.cuts[0, 2]) + 24 and cut.problem is None
    arrays = [picture(i) for i in range(4)]
    prompt = talk({"type": "video", "video": arrays})
    inputs = processor.apply_chat_template(prompt, tokenize=True, num_visual_tokens=4)
    model.eval()
    with torch.no_grad():
        packed = model(**model_inputs(batch, processor.image_processor.normalised)).logits[0]
        model.language_model.set_attn_implementation("sdpa")
        alone = model(**inputs, use_cache=False).logits[0]
    torch.testing.assert_close(packed[: len(alone)], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("share", ["even", "size"])
def test_frames_of_a_sample_share_a_total(share, clips, tmp_path, tiny_config):
    """Four frames of 12 tokens fit a total of 50: planned, collated and in the prompt that names no count."""
    counts = {
        "num_visual_tokens": (4, 12, 20),
        "probabilities": (0, 0, 1),
        "total": 50,
        "share": share,
        "sides": "aspect",
    }
    budget = BudgetConfig(**counts)
    processor = build_processor(tiny_config.model, budget)
    index = load_or_build_index([clips], processor, tmp_path / "index", Limits())
    data = DataConfig(pack_length=640, packs_per_step=1, lockstep_packs=1, max_images_per_pack=12)
    planner = Planner(index, VisualTokenBudget.of(budget), data, seed=0, loss_weighting="token")
    samples = planner.read(0, 0, 3)
    dataset = PackDataset(index, processor, "token", blank_count=4, limits=Limits())
    for sample_id, count, tokens in zip(samples.id.tolist(), samples.count.tolist(), samples.tokens.tolist()):
        prepared = dataset.prepared(sample_id, count)[0]
        assert count == (12 if index.num_images[sample_id] else 0) and len(prepared.input_ids) == tokens
        inputs = processor.apply_chat_template(dataset.sample(sample_id).messages_with_images(), tokenize=True)
        assert inputs["input_ids"][0].tolist() == prepared.input_ids


def test_a_file_is_the_same_clip_in_a_shard_and_in_a_prompt(tmp_path, processor):
    data = video(13)
    path = shard(
        tmp_path / "file.tar",
        [(talk({"type": "video"}), {"0.mp4": data}), (talk({"type": "image"}), {"jpg": png(picture(1))})],
    )
    index = load_or_build_index([path], processor, tmp_path / "index", Limits())
    assert index.num_images.tolist() == [4, 1] and index.image_sizes.tolist() == [[32, 40]] * 5
    dataset = PackDataset(index, processor, "token", blank_count=4, limits=Limits())
    prepared = dataset.prepared(0, 12)[0]
    (tmp_path / "clip.mp4").write_bytes(data)
    for clip in (data, str(tmp_path / "clip.mp4"), tmp_path / "clip.mp4", clip_frames(data)):
        inputs = processor.apply_chat_template(
            talk({"type": "video", "video": clip}), tokenize=True, num_visual_tokens=12
        )
        assert inputs["input_ids"][0].tolist() == prepared.input_ids and inputs["num_tiles"].tolist() == [1] * 4
        assert torch.equal(
            inputs["pixel_values"], processor.image_processor.normalised(torch.from_numpy(prepared.tiles))
        )


def test_bad_clips_of_a_shard_are_left_out_each_with_its_line(tmp_path, processor):
    image = png(picture(0))
    samples = {
        "at most 16 are taken": (talk({"type": "video", "frames": 17}), {f"{i}.png": image for i in range(17)}),
        "video 0: not a readable video": (talk({"type": "video"}), {"0.mp4": b"no video at all"}),
        "frames=0": (talk({"type": "video", "frames": 0}), {}),
        "5 tags of images, videos and their frames but the sample has 1": (
            talk({"type": "video", "frames": 5}),
            {"0.png": image},
        ),
        "wants a video file the sample has an image": (talk({"type": "video"}), {"0.png": image}),
        "wants an image the sample has a video file": (talk({"type": "image"}), {"0.mp4": video(2)}),
        "an assistant message holds a video": (
            [*talk(), {"role": "assistant", "content": [{"type": "video"}]}],
            {"0.mp4": video(2)},
        ),
    }
    path = shard(tmp_path / "bad.tar", [*samples.values(), (talk({"type": "video"}), {"0.mp4": video(2)})])
    index = load_or_build_index([path], processor, tmp_path / "index", Limits())
    skipped = index.entries[0]["skipped"]
    assert len(index) == 1 and len(skipped) == len(samples)
    for part, problem in zip(samples, skipped):
        assert part in problem["detail"] and "\n" not in problem["detail"], problem


def test_another_sampling_has_another_index_and_the_default_the_old_one(processor, monkeypatch):
    before = fingerprint(processor)
    monkeypatch.setattr(processor, "max_frames", 8)
    fewer = fingerprint(processor)
    monkeypatch.setattr(processor, "frames_per_second", 2.0)
    assert len({before, fewer, fingerprint(processor)}) == 3
    assert before.split("-")[:2] == fewer.split("-")[:2]


def test_a_clip_that_is_too_long_stops_where_it_is_asked(processor):
    with pytest.raises(ValueError, match="17 frames, at most 16"):
        processor.apply_chat_template(talk({"type": "video", "video": [picture(0)] * 17}), tokenize=True)
    with pytest.raises(ValueError, match="empty clip"):
        processor.apply_chat_template(talk({"type": "video", "video": []}), tokenize=True)
