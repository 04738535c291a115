"""A real server process asked by the real `openai` client: its answers are `Generator`'s, and what is wrong is one line."""

import concurrent.futures
import http.server
import importlib.util
import io
import json
import os
import threading
import time

import openai
import pytest
from clip_files import video
from PIL import Image
from servers import Server, data_url

from tokenflex.infer import Generator

QUESTION = "What is written?"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(("red", "green", "blue")):
        image = Image.new("RGB", (64, 48), colour)
        image.paste("white", (8 * number, 4, 30, 40))
        image.save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(3)]


@pytest.fixture(scope="module")
def server(tiny_export, tmp_path_factory):
    limits = (
        "--max-new-tokens",
        "400",
        "--max-images",
        "3",
        "--max-body-bytes",
        "100000",
        "--max-prompt-tokens",
        "600",
        "--max-frames",
        "6",
        "--max-frame-pixels",
        "5000",
    )
    server = Server(tiny_export, tmp_path_factory.mktemp("log") / "log", *limits, "--max-image-pixels", "1000000")
    yield server
    server.stop()
    assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="module")
def generator(tiny_export):
    return Generator(tiny_export)


def asking(pictures, text=QUESTION):
    images = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def ask(server, messages, counts=None, num_new=12, **options):
    extra = {} if counts is None else {"extra_body": {"num_visual_tokens": counts}}
    create = server.client().chat.completions.create
    return create(model="tiny", messages=messages, max_tokens=num_new, **{**extra, **options})


@pytest.mark.parametrize(
    "num_images, counts, wanted",
    [
        (0, None, None),
        (1, None, None),
        (1, 4, 4),
        (1, 7, 7),
        (1, [2, 3], (2, 3)),
        (2, [4, 12], [4, 12]),
        (2, [[2, 3], 4], [(2, 3), 4]),
        (3, [2, 3], (2, 3)),
    ],
)
def test_an_answer_is_the_generators_at_every_count(num_images, counts, wanted, server, generator, pictures):
    expected = generator(QUESTION, pictures[:num_images], wanted, max_new_tokens=12)
    answer = ask(server, asking(pictures[:num_images]), counts)
    assert expected and answer.choices[0].message.content == expected
    per_image = wanted if isinstance(wanted, list) else [wanted or 12] * num_images
    sizes = [count if isinstance(count, int) else count[0] * count[1] for count in per_image]
    assert answer.usage.prompt_tokens_details.image_tokens == sum(sizes)
    text = generator.inputs(
        [{"role": "user", "content": [{"type": "image", "image": p} for p in pictures[:num_images]]
          + [{"type": "text", "text": QUESTION}]}], 1
    )  # fmt: skip
    assert answer.usage.prompt_tokens == text["input_ids"].shape[1] + sum(sizes) - num_images
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("total, each", [(36, 12), (35, 4), (12, 4), (0, 12)])
def test_a_total_is_shared_by_the_images_as_the_processor_shares_it(total, each, server, generator, pictures):
    answer = ask(server, asking(pictures), None, extra_body={"total_visual_tokens": total})
    assert answer.choices[0].message.content == generator(QUESTION, pictures, each, max_new_tokens=12)
    assert answer.usage.prompt_tokens_details.image_tokens == 3 * each


def watching(*clips, text=QUESTION):
    """A question about videos and pictures."""
    items = [
        {"type": "video_url", "video_url": {"url": data_url(clip, "video/mp4")}} if isinstance(clip, bytes)
        else {"type": "image_url", "image_url": {"url": data_url(clip)}}
        for clip in clips
    ]  # fmt: skip
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("with_picture", [False, True])
@pytest.mark.parametrize(
    "asked, each, others",
    [
        ({}, 12, 12),
        ({"num_visual_tokens": 4}, 4, 4),
        ({"num_visual_tokens": [4, 7]}, 4, 7),
        ({"total_visual_tokens": 47}, 4, 4),
    ],
)
def test_a_video_is_asked_about_as_its_frames(asked, each, others, with_picture, server, generator, pictures):
    """The answer is that of the processor's own video item; a count that stands for the video is each frame's."""
    if not with_picture and isinstance(asked.get("num_visual_tokens"), list):
        asked = {"num_visual_tokens": [each]}
    clip = video(13, rate=4)  # four frames at one per second
    content = [{"type": "video", "video": clip}]
    content += [{"type": "image", "image": pictures[0]}] if with_picture else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]
    counts = [each] * 4 + [others] * with_picture
    inputs = generator.processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, num_visual_tokens=counts
    )
    output = generator.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = generator.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    answer = ask(server, watching(clip, *pictures[:with_picture]), None, extra_body=asked)
    assert expected and answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert answer.usage.prompt_tokens_details.image_tokens == sum(counts)
    assert [seen["num_visual_tokens"] for seen in answer.model_extra["tokenflex"]["images"]] == counts


def test_a_stream_joins_to_the_answer(server, pictures):
    messages = asking(pictures[:1])
    whole = ask(server, messages, 4, 40)
    stream = list(ask(server, messages, 4, 40, stream=True, stream_options={"include_usage": True}))
    *pieces, last, usage = stream
    assert "".join(piece.choices[0].delta.content for piece in pieces) == whole.choices[0].message.content
    assert len(pieces) > 3 and pieces[0].choices[0].delta.role == "assistant"
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    cached = usage.usage.prompt_tokens_details.cached_tokens
    assert cached == whole.usage.prompt_tokens - 1, "the prompt had just been run"
    whole.usage.prompt_tokens_details.cached_tokens = cached
    assert usage.usage == whole.usage and not usage.choices


def test_a_further_turn_is_answered_as_ever_and_runs_what_is_new(server, generator, pictures):
    talk = asking(pictures[:2], "and which?")
    first = ask(server, talk, [4, 12])
    talk += [{"role": "assistant", "content": first.choices[0].message.content}, *asking(pictures[2:], "now?")]
    answer = ask(server, talk, [4, 12, 4])
    details = answer.usage.prompt_tokens_details
    assert details.cached_tokens >= first.usage.prompt_tokens and details.image_tokens == 20
    taken = [
        {"role": turn["role"], "content": [{"type": "image", "image": next(files)} if item["type"] != "text" else item for item in turn["content"]] if isinstance(turn["content"], list) else turn["content"]}
        for files in [iter([picture.read_bytes() for picture in pictures])] for turn in talk
    ]  # fmt: skip
    alone, _ = generator.generate(generator.inputs(taken, [4, 12, 4]), max_new_tokens=12, do_sample=False)
    assert answer.choices[0].message.content == generator.processor.decode(alone, skip_special_tokens=True).strip()
    other = ask(server, asking(pictures[1:], "and which?"), [4, 12]).usage
    assert other.prompt_tokens_details.cached_tokens < 10, "another image stands at the begin"


def test_an_answer_ends_before_a_stop_text(server, pictures):
    text = ask(server, asking(pictures[:1]), 4, 40).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    wanted = text[: text.find(stop)].rstrip()
    cut = ask(server, asking(pictures[:1]), 4, 40, stop=[stop, "\u2603 never"])
    assert cut.choices[0].message.content == wanted and cut.choices[0].finish_reason == "stop"
    pieces = [
        piece.choices[0].delta.content for piece in ask(server, asking(pictures[:1]), 4, 40, stop=stop, stream=True)
    ]
    assert "".join(piece or "" for piece in pieces) == wanted


def test_a_drawn_answer_is_drawn_again_from_its_seed(server, pictures):
    drawn = [
        ask(server, asking(pictures[:1]), temperature=1.5, seed=seed).choices[0].message.content for seed in (5, 5, 6)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.fixture
def routed_server(thrifty_export, tmp_path):
    server = Server(thrifty_export, tmp_path / "log")
    yield server
    server.stop()


def test_auto_in_a_request_is_the_routers_count(routed_server, generator, pictures):
    """At an effort and within a total too; what is no effort is one line."""
    asked = lambda **fields: ask(routed_server, asking(pictures[:2]), extra_body=fields)  # noqa: E731
    for fields, wanted in (
        ({"num_visual_tokens": "auto"}, [4, 4]),
        ({"num_visual_tokens": "auto", "effort": 1}, [12, 12]),
        ({"num_visual_tokens": "auto", "total_visual_tokens": 16, "effort": 1}, [4, 4]),
    ):
        answer = asked(**fields)
        assert answer.usage.prompt_tokens_details.image_tokens == sum(wanted)
        assert answer.choices[0].message.content == generator(QUESTION, pictures[:2], wanted, max_new_tokens=12)
    for fields, message in (
        ({"num_visual_tokens": "auto", "effort": 1.5}, "effort"),
        ({"num_visual_tokens": "auto", "effort": "high"}, "effort"),
        ({"num_visual_tokens": 4, "effort": 0.5}, "effort"),
        ({"num_visual_tokens": [7, "auto"]}, r'\[7, "auto"\]: wanted a positive number'),
        ({"num_visual_tokens": "auto", "total_visual_tokens": 7}, "total_visual_tokens=7: 2 images"),
    ):
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            asked(**fields)
        assert "\n" not in caught.value.body["message"]


def test_a_conversation_goes_on(server, generator, pictures):
    first = asking(pictures[:1], "Which colour?")
    talk = [{"role": "system", "content": "Be short."}, *first, {"role": "assistant", "content": "red"}]
    talk = [*talk, *asking(pictures[1:2], "And here?")]
    messages = [
        {
            "role": turn["role"],
            "content": [
                {"type": "text", "text": item["text"]} if item["type"] == "text"
                else {"type": "image", "image": item["image_url"]["url"]}
                for item in turn["content"]
            ] if isinstance(turn["content"], list) else turn["content"],
        }
        for turn in talk
    ]  # fmt: skip
    inputs = generator.inputs(messages, [4, 12])
    output = generator.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = generator.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert ask(server, talk, [4, 12]).choices[0].message.content == expected


def test_the_model_says_its_counts(server):
    (model,) = server.client().models.list().data
    assert (model.id, model.trained_num_visual_tokens, model.default_num_visual_tokens) == ("tiny", [4, 12], 12)
    assert model.default_total_visual_tokens is None and model.limits["max_frames"] == 6
    is_there = importlib.util.find_spec("av") is not None
    assert model.videos == {"are_read": is_there, "frames_per_second": 1.0, "max_frames": 16}


def test_requests_side_by_side_get_their_own_answers_and_health_answers_at_once(server, generator, pictures):
    expected = [generator(QUESTION, [picture], 4, max_new_tokens=100) for picture in pictures]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, server, asking([picture]), 4, 100) for picture in pictures]
        healthy = 0
        while not all(answer.done() for answer in answers):
            begin = time.monotonic()
            assert server.raw("GET", "/health") == (200, '{"status":"ok"}')
            healthy += not all(answer.done() for answer in answers)
            assert time.monotonic() - begin < 10
        assert healthy > 1
        assert [answer.result().choices[0].message.content for answer in answers] == expected


def test_a_client_that_hangs_up_holds_nobody_up(server, pictures):
    stream = ask(server, asking(pictures[:1]), 4, 400, stream=True)
    next(stream)
    stream.close()
    begin = time.monotonic()
    assert ask(server, asking(pictures[:1]), 4, 1).choices[0].message.content is not None
    assert server.process.poll() is None and time.monotonic() - begin < 30


def png(width, height, pixels=bytes):
    file = io.BytesIO()
    Image.frombytes("RGB", (width, height), pixels(width * height * 3)).save(file, "PNG")
    return file.getvalue()


GOOD = png(8, 8)
NOISE = png(64, 64, os.urandom)
CLIP = video(2) if importlib.util.find_spec("av") else b""
USER = [{"role": "user", "content": "hello"}]


def with_image(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def with_video(url):
    return [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}]


BAD = {
    "no messages": ({"messages": []}, 400, "messages: List should have at least 1 item"),
    "another model": ({"model": "gpt", "messages": USER}, 404, "model: 'gpt' is not served here; 'tiny' is"),
    "unknown field": ({"messages": USER, "numvisualtokens": 3}, 400, "numvisualtokens: unknown field"),
    "role": ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role: Input should be"),
    "assistant last": ({"messages": [*USER, {"role": "assistant", "content": "x"}]}, 400, "the last one must be the user"),
    "sound": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "messages.0.content.0"),
    "auto": ({"messages": with_image(data_url(GOOD)), "num_visual_tokens": "auto"}, 400, "needs a router, and this model has none"),
    "count 0": ({"messages": with_image(data_url(GOOD)), "num_visual_tokens": 0}, 400, "num_visual_tokens: 0: wanted"),
    "count true": ({"messages": USER, "num_visual_tokens": True}, 400, "num_visual_tokens: true: wanted"),
    "count text": ({"messages": USER, "num_visual_tokens": "many"}, 400, 'num_visual_tokens: "many": wanted'),
    "counts of other images": ({"messages": USER, "num_visual_tokens": [4, 4, 4]}, 400, "3 entries for 0 images"),
    "vast count": ({"messages": with_image(data_url(GOOD)), "num_visual_tokens": 10**9}, 400, "at most 600 tokens"),
    "vast sides": ({"messages": with_image(data_url(GOOD)), "num_visual_tokens": [500, 500]}, 400, "at most 600"),
    "all together": ({"messages": with_image(data_url(GOOD)), "num_visual_tokens": 600}, 400, "at most 600 are taken"),
    "too long": ({"messages": [{"role": "user", "content": "a b " * 1000}]}, 400, "the prompt has"),
    "tokens": ({"messages": USER, "max_tokens": 401}, 400, "max_tokens: 401; at most 400"),
    "temperature": ({"messages": USER, "temperature": 3}, 400, "temperature: Input should be less"),
    "several answers": ({"messages": USER, "n": 2}, 400, "n: is not done here"),
    "stop": ({"messages": USER, "stop": [""]}, 400, "stop: wanted at most 4"),
    "images": ({"messages": with_image(data_url(GOOD)) * 4}, 400, "4 images and videos; at most 3"),
    "total too small": ({"messages": with_image(data_url(GOOD)), "total_visual_tokens": 3}, 400,
                        "total_visual_tokens=3: 1 images (or tiles, or frames) have 4 visual tokens at the least"),
    "total and count": ({"messages": with_image(data_url(GOOD)), "total_visual_tokens": 12, "num_visual_tokens": 4}, 400,
                        "total_visual_tokens: 12 came with num_visual_tokens"),
    "total and counts": ({"messages": with_image(data_url(GOOD)), "total_visual_tokens": 12, "num_visual_tokens": [4]}, 400,
                         "total_visual_tokens: 12 came with num_visual_tokens"),
    "total and auto": ({"messages": with_image(data_url(GOOD)), "total_visual_tokens": 12, "num_visual_tokens": "auto"}, 400,
                       "needs a router, and this model has none"),
    "total text": ({"messages": USER, "total_visual_tokens": "12"}, 400, "total_visual_tokens: Input should be a valid integer"),
    "total true": ({"messages": USER, "total_visual_tokens": True}, 400, "total_visual_tokens: Input should be a valid integer"),
    "total 1.5": ({"messages": USER, "total_visual_tokens": 1.5}, 400, "total_visual_tokens: Input should be a valid integer"),
    "total below 0": ({"messages": USER, "total_visual_tokens": -1}, 400, "total_visual_tokens: Input should be greater than or equal"),
    "vast total": ({"messages": USER, "total_visual_tokens": 10**9}, 400, "total_visual_tokens: 1000000000: at most 600 tokens"),
    "video url": ({"messages": with_video("http://127.0.0.1:1/x.mp4")}, 400, "content[0].video_url: only data: URLs are taken and nothing was fetched; send the video"),
    "video data url": ({"messages": with_video("data:video/mp4,abc")}, 400, "must be data:video/...;base64"),
    "video no base64": ({"messages": with_video("data:video/mp4;base64,???")}, 400, "content[0].video_url: no base64"),
    "video field": ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:", "fps": 9}}]}]}, 400,
                    "fps: unknown field"),
    "system video": ({"messages": [{**with_video("data:video/mp4;base64,AA==")[0], "role": "system"}, *USER]}, 400, "of role system"),
    "videos": ({"messages": with_video("data:video/mp4;base64,AA==") * 4}, 400, "4 images and videos; at most 3"),
    "counts of other videos": ({"messages": with_video("data:video/mp4;base64,AA=="), "num_visual_tokens": [4, 4, 4]}, 400,
                               "3 entries for 1 images and videos"),
    "system image": ({"messages": [{**with_image(data_url(GOOD))[0], "role": "system"}, *USER]}, 400, "of role system"),
    "no base64": ({"messages": with_image("data:image/png;base64,???")}, 400, "content[0].image_url: no base64"),
    "data url": ({"messages": with_image("data:image/png,abc")}, 400, "must be data:image/...;base64"),
    "no image": ({"messages": with_image(data_url(b"hello, I am text"))}, 400, "not a readable image (begins with"),
    "cut image": ({"messages": with_image(data_url(NOISE[:2000]))}, 400, "not a readable image"),
    "pixels": ({"messages": with_image(data_url(png(2000, 1000)))}, 400, "2000 x 1000 pixels by its header"),
    "url": ({"messages": with_image("http://127.0.0.1:1/x.png")}, 400, "only data: URLs are taken and nothing was fetched"),
    "file": ({"messages": with_image("file:///etc/hostname")}, 400, "nothing was fetched"),
    "path": ({"messages": with_image("/etc/hostname")}, 400, "nothing was fetched"),
    "size": ({"messages": [{"role": "user", "content": "a" * 100_000}]}, 413, "more than 100000 bytes"),
    "no content": ({"messages": [{"role": "user", "content": []}]}, 400, "messages.0.content: List should have"),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half of a character"),
    "a long name": ({"messages": USER, "x" * 50_000: 1}, 400, "xxx..."),
    "no number": ({"messages": USER, "temperature": float("nan")}, 400, "temperature: Input should be"),
    "no JSON": (b"{", 400, "the body is no JSON"),
    "deep": (b"[" * 50_000, 400, "nested too deeply"),
    "deep counts": (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "num_visual_tokens": ' + b"[" * 990
                    + b"]" * 990 + b"}", 400, ""),
    "a list": (b"[]", 400, "no JSON object"),
    "a vast number": (b'{"seed": 1' + b"0" * 5000 + b"}", 400, "the body is no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_request_is_told_in_one_line(name, server):
    body, status, message = BAD[name]
    data = body if isinstance(body, bytes) else json.dumps({"model": "tiny", **body})
    got, text = server.raw("POST", "/v1/chat/completions", data)
    error = json.loads(text)["error"]
    assert got == status and message in error["message"], text
    assert "\n" not in error["message"] and error["type"] == "invalid_request_error"
    assert len(text) < 1000


def test_a_wrong_video_is_told_in_one_line(server):
    """Nothing but the containers of videos is opened, whatever its URL calls it."""
    long, large = video(40, rate=4), video(2, size=(160, 128))
    for clips, message in (
        ([b"hello, I am text"], "content[0].video_url: not a readable video (begins with b'hello, I"),
        ([b"#EXTM3U\nhttp://127.0.0.1/secret.ts\n"], "not a readable video (begins with b'#EXTM3U"),
        ([b""], "not a readable video (begins with b''"),
        ([video(13)[:300]], "content[0].video_url: not a readable video"),
        ([large], "frames of 160 x 128 pixels, at most 5000 are allowed"),
        ([long], "content[0].video_url: 10 frames up to here; all videos have at most 6"),
        ([video(13), video(13)], "content[1].video_url: 8 frames up to here"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(server, watching(*clips))
        error = caught.value.body
        assert message in error["message"] and "\n" not in error["message"], error
        assert error["code"] == "invalid_video" and error["param"].startswith("messages[0].content[")


def test_the_clients_own_exceptions_come_of_it(server, pictures):
    with pytest.raises(openai.BadRequestError, match="needs a router, and this model has none"):
        ask(server, asking(pictures[:1]), "auto")
    with pytest.raises(openai.BadRequestError, match="at most 600 are taken"):
        ask(server, asking(pictures[:1]), 600, stream=True)


def test_what_a_browser_might_be_made_to_send_is_refused(server):
    data = json.dumps({"model": "tiny", "messages": USER})
    status, text = server.raw("POST", "/v1/chat/completions", data, **{"Content-Type": "text/plain"})
    assert status == 415 and "wanted application/json" in text
    assert server.raw("GET", "/v1/models", Host="elsewhere.example")[0] == 400
    assert server.raw("GET", "/nothing")[0] == 404 and server.raw("GET", "/v1/chat/completions")[0] == 405


def test_a_chunked_body_is_held_to_the_limit_too(server):
    chunks = (b"x" * 50_000 for _ in range(3))
    assert server.raw("POST", "/v1/chat/completions", chunks)[0] == 413


@pytest.fixture(scope="module")
def narrow(tiny_export, tmp_path_factory):
    """A server with a key, a second per request, nobody waiting, and images from this machine."""
    options = ("--max-seconds", "1", "--max-waiting", "1", "--max-new-tokens", "100000", "--allow-urls", "127.0.0.1")
    folder = tmp_path_factory.mktemp("narrow")
    server = Server(tiny_export, folder / "log", *options, TOKENFLEX_API_KEY="secret")
    yield server
    server.stop()
    assert "Traceback" not in server.log.read_text()


def test_a_key_is_wanted_where_one_is_set(narrow):
    for key in ("wrong", "s\u00e9cret".encode().decode("latin-1")):
        status, text = narrow.raw("GET", "/v1/models", Authorization=f"Bearer {key}")
        assert status == 401 and "API key" in text
    assert narrow.client(api_key="secret").models.list().data[0].id == "tiny"


def test_time_and_places_are_limited(narrow, pictures):
    create = narrow.client(api_key="secret").chat.completions.create

    def late():
        with pytest.raises(openai.APIError) as caught:
            create(model="tiny", messages=asking(pictures[:1]), max_tokens=100_000, temperature=2.0, seed=1)
        return caught.value

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        errors = [error.result() for error in [pool.submit(late) for _ in range(5)]]
    assert {error.status_code for error in errors} == {503, 504}, errors
    assert any("1 requests wait already" in str(error) for error in errors)
    assert any("no whole answer within 1 s" in str(error) for error in errors)
    with pytest.raises(openai.APIError, match="no whole answer within 1 s"):  # the status has been sent by then
        list(create(model="tiny", messages=asking([]), max_tokens=100_000, temperature=2.0, seed=1, stream=True))


def test_images_and_videos_are_fetched_from_hosts_that_are_allowed_and_from_no_other(narrow):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(302 if self.path == "/moved" else 200)
            self.send_header("Location", "/image")
            self.end_headers()
            self.wfile.write({"/image": GOOD, "/video": CLIP}.get(self.path, b"no image"))

        def log_message(self, *arguments):
            """Says nothing."""

    def status(url, with_item=with_image):
        body = json.dumps({"model": "tiny", "messages": with_item(url), "max_tokens": 1})
        return narrow.raw("POST", "/v1/chat/completions", body, Authorization="Bearer secret")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        port = site.server_address[1]
        assert status(f"http://127.0.0.1:{port}/image")[0] == 200 and asked == ["/image"]
        for url in (f"http://localhost:{port}/image", f"http://127.0.0.1@localhost:{port}/image", "ftp://127.0.0.1/x"):
            assert "nothing was fetched" in status(url)[1]
        assert asked == ["/image"]
        got, text = status(f"http://127.0.0.1:{port}/moved")
        assert got == 400 and "could not be fetched" in text and asked == ["/image", "/moved"]
        assert "not a readable image" in status(f"http://127.0.0.1:{port}/text")[1]
        assert "nothing was fetched" in status(f"http://localhost:{port}/video", with_video)[1]
        assert status(f"http://127.0.0.1:{port}/video", with_video)[0] == (200 if CLIP else 400)
        assert "not a readable video" in status(f"http://127.0.0.1:{port}/text", with_video)[1] or not CLIP
        assert asked[-2:] == ["/video", "/text"]
        site.shutdown()
