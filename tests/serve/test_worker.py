"""The worker's own laws, in this process: one request's failure is that request's, and what is left is answered."""

import importlib.util
import queue
import socket
import sys
from dataclasses import replace

import pytest
from clip_files import numbers, video

from tokenflex import cli
from tokenflex.infer import Generator
from tokenflex.serve import RequestRefused, ServeLimits
from tokenflex.serve.clips import with_frames
from tokenflex.serve.requests import ChatRequest
from tokenflex.serve.worker import Failed, Finished, Piece, Started, Worker


def request(text="hello", num_new=5):
    return ChatRequest(
        messages=[{"role": "user", "content": [{"type": "text", "text": text}]}],
        num_visual_tokens=None,
        max_new_tokens=num_new,
        temperature=0.0,
        top_p=1.0,
        seed=None,
        stop=(),
        is_stream=False,
        has_usage=False,
    )


@pytest.fixture(scope="module")
def generator(tiny_export):
    return Generator(tiny_export)


@pytest.fixture
def worker(generator):
    worker = Worker(generator, ServeLimits(max_waiting=2))
    yield worker
    worker.close()


def until_end(events):
    got = []
    while not got or not isinstance(got[-1], (Finished, Failed)):
        got.append(events.get(timeout=60))
    return got


def test_a_failure_is_told_to_its_request_and_ends_nothing_else(worker, generator, monkeypatch, capsys):
    def fail(**inputs):
        raise RuntimeError("CUDA out of memory: 3 secrets")

    events = queue.Queue()
    with monkeypatch.context() as broken:
        broken.setattr(generator.model, "generate", fail)
        worker.submit(request(), events.put)
        started, failed = until_end(events)
    assert isinstance(started, Started) and failed.error.http_status == 500
    assert "secrets" not in str(failed.error) and "CUDA out of memory" in capsys.readouterr().err
    worker.submit(request(), events.put)
    assert isinstance(until_end(events)[-1], Finished)


def test_events_are_in_order_and_of_one_request_at_a_time(worker):
    events = queue.Queue()
    for number in range(3):
        worker.submit(request(f"question {number}", 6), lambda event, number=number: events.put((number, event)))
    with pytest.raises(RequestRefused, match="2 requests wait already"):
        worker.submit(request(), events.put)
    told = []
    while sum(isinstance(event, Finished) for _, event in told) < 3:
        told.append(events.get(timeout=60))
    assert [number for number, _ in told] == sorted(number for number, _ in told)
    for number in range(3):
        first, *pieces, last = (event for of, event in told if of == number)
        assert isinstance(first, Started) and all(isinstance(piece, Piece) for piece in pieces)
        assert isinstance(last, Finished) and last.num_new_tokens <= 6


def test_one_that_nobody_waits_for_is_not_begun(worker):
    first, second = queue.Queue(), queue.Queue()
    running = worker.submit(request(num_new=200), first.put)
    worker.submit(request(), second.put).cancel()
    running.cancel()
    assert isinstance(until_end(second)[0], Failed), "not one token of it was made"


def about(clip, counts=None):
    items = [{"type": "text", "text": "What?"}, {"type": "video", "video": clip}, {"type": "image", "image": b"png"}]
    return replace(request(), messages=[{"role": "user", "content": items}], num_visual_tokens=counts)


@pytest.mark.parametrize("counts, wanted", [([4, 12], [4, 4, 4, 4, 12]), (7, 7), ("auto", "auto"), (None, None)])
def test_a_video_becomes_its_frames_and_its_count_that_of_each(counts, wanted, processor):
    framed = with_frames(about(video(13), counts), processor, ServeLimits(), lambda: False)
    assert framed.num_visual_tokens == wanted
    ((text, *images, picture),) = (message["content"] for message in framed.messages)
    assert text["type"] == "text" and picture == {"type": "image", "image": b"png"}
    assert numbers(image["image"] for image in images) == [0, 4, 8, 12]


@pytest.mark.parametrize("seconds, is_over", [(0, False), (10, True)])
def test_decoding_ends_when_its_time_is_up_or_nobody_waits(seconds, is_over, processor):
    with pytest.raises(
        RequestRefused, match=rf"content\[1\].video_url: decoding the videos took more than {seconds} s"
    ):
        with_frames(about(video(13)), processor, ServeLimits(max_decode_seconds=seconds), lambda: is_over)


def test_without_pyav_a_video_is_refused_with_what_to_do(processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RequestRefused, match=r"PyAV is missing \(pip install 'tokenflex\[video\]'\)") as caught:
        with_frames(about(b"\0\0\0\x20ftypisom"), processor, ServeLimits(), lambda: False)
    assert caught.value.http_status == 400 and "\n" not in str(caught.value)


def test_frames_that_were_asked_about_before_are_not_encoded_again(generator):
    """Nor are frames of other videos taken for them."""
    encoded = []
    hook = generator.model.vision_tower.register_forward_hook(
        lambda tower, inputs, output: encoded.append(len(output.last_hidden_state))
    )
    for clip, num_new in ((video(13), 4), (video(13), 0), (video(17), 1)):
        encoded.clear()
        framed = with_frames(about(clip), generator.processor, ServeLimits(), lambda: False)
        generator.inputs([{"role": "user", "content": framed.messages[0]["content"][:-1]}], 4)
        assert sum(encoded) == num_new
    hook.remove()


def test_a_server_that_cannot_start_says_why_in_one_line(tiny_export, tmp_path, monkeypatch, capsys):
    """And before any weight is read: `Generator` is not reached."""
    monkeypatch.setattr("tokenflex.infer.Generator", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, message in (
            ([str(tmp_path)], f"error: {tmp_path}: no exported model there"),
            ([str(tiny_export), "--port", port], f"error: --host 127.0.0.1 --port {port}: "),
            ([str(tiny_export), "--host", "256.0.0.1"], "error: --host 256.0.0.1 --port 8000: "),
            ([str(tiny_export), "--port", "70000"], "error: --host 127.0.0.1 --port 70000: "),
        ):
            assert cli.main(["serve", *arguments]) == 2
            said = capsys.readouterr().err
            assert message in said and said.count("\n") == 1
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: name != "uvicorn" and find(name, *more) or None
    )
    assert cli.main(["serve", str(tiny_export)]) == 2
    assert "needs uvicorn, which is not installed: pip install 'tokenflex[serve]'" in capsys.readouterr().err
