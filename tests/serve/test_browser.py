"""The demo's page in a real headless browser: `make test-browser`. Screenshots go to $TOKENFLEX_SCREENSHOTS, where it is set."""

import json
import os
from pathlib import Path

import pytest
from browser import CHROMIUM, ask, opened, set_stop
from PIL import Image
from servers import Server

from tokenflex.infer import Generator

pytest.importorskip("playwright", reason="needs playwright: make test-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the PATH: apt-get install chromium")

HOSTILE = "<img src=x onerror=alert(1)><script>document.title = 'broken'</script>"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "blue.png"
    Image.new("RGB", (120, 60), "blue").save(path)
    return path


@pytest.fixture(scope="module")
def server(thrifty_export, tmp_path_factory):
    server = Server(
        thrifty_export, tmp_path_factory.mktemp("log") / "log", "--max-body-bytes", "100000", command="demo"
    )
    yield server
    server.stop()


def kept(page, name):
    """A screenshot for whoever looks."""
    folder = os.environ.get("TOKENFLEX_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def not_blue(page, side):
    """Pixels of a side's canvas that are not the image's."""
    return (
        page.locator("canvas")
        .nth(side)
        .evaluate(
            "canvas => { const d = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data; let n = 0;"
            " for (let i = 0; i < d.length; i += 4) if (d[i] || d[i + 1] || d[i + 2] !== 255) n++; return n }"
        )
    )


def test_two_counts_side_by_side(server, thrifty_export, picture):
    """Answers are `Generator`'s at both counts, a finer grid is more lines, and nobody but the server is asked."""
    with opened(server.url) as (page, asked, complaints):
        kept(page, "empty")
        set_stop(page, 0, 1)
        answers = ask(page, "What is written?", picture)
        kept(page, "answers")
        generator = Generator(thrifty_export)
        last = generator.model.config.trained_num_visual_tokens[-1]
        first = generator.model.config.trained_num_visual_tokens[0]
        wanted = [generator("What is written?", [picture], count) for count in (first, last)]
        assert [answer.strip() for answer in answers] == [answer or "(an empty answer)" for answer in wanted]
        figures = page.locator(".figures").all_text_contents()
        assert figures[0].startswith(f"{first} visual tokens") and figures[1].startswith(f"{last} visual tokens")
        assert 0 < not_blue(page, 0) < not_blue(page, 1)
        box = page.locator("canvas").nth(0).bounding_box()
        assert box["width"] / box["height"] == pytest.approx(2, rel=0.02)
        before = not_blue(page, 0)
        page.locator("canvas").nth(0).hover(position={"x": 5, "y": 5})
        assert page.locator(".token").nth(0).text_content().startswith(f"token 1 of {first}: row 1, column 1")
        assert not_blue(page, 0) > before
        kept(page, "hover")
        assert {url.split("/")[2] for url in asked if url.startswith("http")} == {f"127.0.0.1:{server.port}"}
        assert complaints == []


def test_auto_shows_what_the_router_chose(server, picture):
    with opened(server.url) as (page, _, complaints):
        set_stop(page, 0, 0)
        assert page.locator(".count").nth(0).text_content() == "auto, effort 0.50"
        assert page.locator(".efforts").nth(0).is_visible() and not page.locator(".efforts").nth(1).is_visible()
        ask(page, "What is written?", picture)
        kept(page, "auto")
        assert page.locator(".figures").nth(0).text_content().startswith("4 visual tokens")
        assert complaints == []


def test_text_is_never_html(server, picture):
    with opened(server.url) as (page, _, complaints):
        ask(page, HOSTILE, picture)
        assert page.title() == "tiny" and page.locator("img").count() == 0 and complaints == []
        page.route("**/v1/chat/completions", lambda route: route.fulfill(
            status=400, content_type="application/json", body=json.dumps({"error": {"message": HOSTILE}})
        ))  # fmt: skip
        assert ask(page, "again") == [HOSTILE, HOSTILE]
        assert page.title() == "tiny" and page.locator("img").count() == 0


@pytest.mark.parametrize("name, data, words", [
    ("notes.png", b"hello", "no image; wanted JPEG, PNG or WebP"),
    ("large.png", b"x" * 100_000, "at most"),
])  # fmt: skip
def test_a_wrong_file_is_one_line(name, data, words, server, tmp_path):
    (tmp_path / name).write_bytes(data)
    with opened(server.url) as (page, _, _):
        page.set_input_files("#image", tmp_path / name)
        page.locator(
            "#problem:not(:empty)"
        ).wait_for()  # a predicate as a string would be eval, which the page's policy forbids
        assert words in page.locator("#problem").text_content() and not page.locator("canvas").nth(0).is_visible()
        kept(page, name)


def test_a_key_is_asked_for_where_one_is_wanted(thrifty_export, picture, tmp_path):
    server = Server(thrifty_export, tmp_path / "log", command="demo", TOKENFLEX_API_KEY="secret")
    try:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page()
            page.goto(server.url)
            page.wait_for_selector("#keys", state="visible")
            assert "wants its API key" in page.locator("#problem").text_content()
            page.fill("#key", "secret")
            page.press("#key", "Tab")
            page.wait_for_selector("#ask:enabled")
            assert len(ask(page, "What is written?", picture)) == 2
            browser.close()
    finally:
        server.stop()
