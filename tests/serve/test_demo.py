"""The page to try a model on: what it says that a token sees is what is pooled, and the server gives it nothing it should not."""

import base64
import hashlib
import json
import re

import pytest
import torch
from PIL import Image
from servers import Server, data_url

from tokenflex.cli.main import main
from tokenflex.export import export_model
from tokenflex.infer import Generator
from tokenflex.model import build_model, build_processor
from tokenflex.model.pooling import pool_grid, sides_of
from tokenflex.serve.page import PAGE, PAGE_HEADERS, POLICY
from tokenflex.serve.seen import seen_images, windows


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "red.png"
    image = Image.new("RGB", (64, 48), "red")
    image.paste("white", (8, 4, 30, 40))
    image.save(path)
    return path


@pytest.fixture(scope="module")
def server(tiny_export, tmp_path_factory):
    server = Server(tiny_export, tmp_path_factory.mktemp("log") / "log", "--max-body-bytes", "200000", command="demo")
    yield server
    server.stop()
    assert "Traceback" not in server.log.read_text()


def body(picture=None, **fields):
    image = [{"type": "image_url", "image_url": {"url": picture}}] if picture else []
    content = [*image, {"type": "text", "text": "What is written?"}]
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields})


@pytest.mark.parametrize("mode", ["adaptive", "max"])
@pytest.mark.parametrize("length, parts", [(16, 3), (16, 16), (27, 12), (5, 7), (7, 1), (1, 3)])
def test_a_token_hangs_on_its_window_and_on_nothing_else(length, parts, mode):
    """The gradient of a token by the patches is nonzero in its window alone; of the mean, in all of it."""
    for part, (begin, end) in enumerate(windows(length, parts, mode)):
        patches = torch.rand(1, length, 2, 1, generator=torch.Generator().manual_seed(part)).requires_grad_()
        pool_grid(patches, (parts, 1), mode)[0, part].sum().backward()
        touched = patches.grad[0, :, 0, 0].nonzero().squeeze(1)
        first, last = round(begin * length), round(end * length)
        is_in = (touched >= first) & (touched < last)
        assert is_in.all() and 0 <= begin < end <= 1
        assert mode == "max" or len(touched) == last - first


@pytest.mark.parametrize("size, count", [((64, 48), 4), ((200, 40), 6), ((30, 90), 12)])
def test_a_tiled_image_is_told_tile_by_tile(size, count, tiny_config, tmp_path):
    """Tokens, tiles and thumbnail of an image add up to the run that stands in the prompt."""
    config = tiny_config.model.model_copy(update={"max_tiles": 4})
    processor = build_processor(config, tiny_config.budget)
    model = build_model(config, tiny_config.budget, processor, torch.float32)
    export_model(model, dict(model.state_dict()), processor, tmp_path / "model")
    generator = Generator(tmp_path / "model")
    Image.effect_noise(size, 80).convert("RGB").save(tmp_path / "image.png")
    content = [{"type": "image", "image": (tmp_path / "image.png").read_bytes()}, {"type": "text", "text": "which?"}]
    messages = [{"role": "user", "content": content}]
    inputs = generator.inputs(messages, count)
    (seen,) = seen_images(generator, messages, inputs)
    tiles = seen.tiles[0] * seen.tiles[1]
    assert tiles + seen.has_thumbnail == int(inputs["num_tiles"][0]) and seen.has_thumbnail == (tiles > 1)
    assert seen.num_visual_tokens == count * (tiles + seen.has_thumbnail)
    assert (seen.rows, seen.columns) == sides_of(count, generator.model.patch_grid)
    assert len(seen.row_windows) == seen.rows and len(seen.column_windows) == seen.columns


def test_an_answer_tells_what_its_tokens_saw(server, picture, tiny_export):
    status, answer = server.raw("POST", "/v1/chat/completions", body(data_url(picture), num_visual_tokens=6))
    found = json.loads(answer)
    assert status == 200
    (image,) = found["tokenflex"]["images"]
    rows, columns = sides_of(6, Generator(tiny_export).model.patch_grid)
    assert (image["num_visual_tokens"], image["rows"], image["columns"]) == (6, rows, columns)
    assert image["num_visual_tokens"] == found["usage"]["prompt_tokens_details"]["image_tokens"]
    assert found["tokenflex"]["seconds"].keys() == {"prompt", "answer"}
    status, answer = server.raw("POST", "/v1/chat/completions", body())
    assert status == 200 and json.loads(answer)["tokenflex"]["images"] == []


def test_the_page_runs_its_own_script_and_reaches_nothing_else(server):
    """Everything in it is its own, named in its policy by hash; the policy lets it ask the server that it came from alone."""
    status, page = server.raw("GET", "/")
    assert status == 200 and page == PAGE
    assert PAGE_HEADERS["Content-Security-Policy"] == POLICY and POLICY.startswith("default-src 'none'")
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in POLICY
    assert not re.search(
        r"https?:|//\w+\.|@import|innerHTML|insertAdjacentHTML|document\.write|\beval\b| style=| on\w+=\"", page
    )


def test_only_this_machine_reaches_it_and_it_fetches_nothing(server, picture):
    assert server.url.startswith("http://127.0.0.1:")
    assert server.raw("GET", "/", Host="evil.example")[0] == 400
    for url in ("http://127.0.0.1:9/a.png", "file:///etc/passwd", "ftp://127.0.0.1/a.png"):
        status, answer = server.raw("POST", "/v1/chat/completions", body(url, num_visual_tokens=4))
        error = json.loads(answer)["error"]
        assert status == 400 and error["code"] == "url_not_allowed" and "\n" not in error["message"]
    with pytest.raises(SystemExit):
        main(["demo", "anywhere", "--allow-urls", "*"])


BAD = {
    "no image": ({"picture": "data:image/png;base64,aGFsbG8="}, 400, "image_url"),
    "half an image": ({"picture": None}, 400, "image_url"),
    "count of zero": ({"num_visual_tokens": 0}, 400, "num_visual_tokens"),
    "count in words": ({"num_visual_tokens": "many"}, 400, "num_visual_tokens"),
    "count that is true": ({"num_visual_tokens": True}, 400, "num_visual_tokens"),
    "two counts, one image": ({"num_visual_tokens": [[1, 2], [3, 4]]}, 400, "2 entries for 1 images"),
    "auto without a router": ({"num_visual_tokens": "auto"}, 400, "this model has none"),
    "effort without auto": ({"num_visual_tokens": 4, "effort": 0.5}, 400, "effort"),
    "too large": ({"picture": "data:image/png;base64," + "A" * 200_000}, 413, "200000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, server, picture):
    fields, wanted, words = BAD[name]
    whole = data_url(picture)
    url = fields.get("picture", whole) or data_url(picture.read_bytes()[:-40])
    status, answer = server.raw(
        "POST", "/v1/chat/completions", body(url, **{key: value for key, value in fields.items() if key != "picture"})
    )
    message = json.loads(answer)["error"]["message"]
    assert status == wanted and words in message and "\n" not in message, message


def test_the_endpoint_has_no_page(tiny_export, tmp_path):
    server = Server(tiny_export, tmp_path / "log")
    assert server.raw("GET", "/")[0] == 404
    server.stop()


@pytest.mark.parametrize("arguments, words", [
    (["{empty}"], "no exported model there"),
    (["{model}", "--port", "70000"], "--port 70000"),
    (["{model}", "--host", "192.0.2.1"], "--host 192.0.2.1"),
])  # fmt: skip
def test_a_wrong_start_is_one_line(arguments, words, tiny_export, tmp_path, capsys):
    given = [argument.format(empty=tmp_path, model=tiny_export) for argument in arguments]
    assert main(["demo", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
