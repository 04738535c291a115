#!/usr/bin/env python3
"""The demo's page in a headless Chromium; as a program, the README's picture of it.

python tests/serve/browser.py runs/quickstart/model page.png "digit at B3" docs/results/demo.png
"""

import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def opened(url, width=900, height=640):
    """A page at `url`, with what it asked for (`asked`, URLs) and what it complained about (`complaints`)."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(120_000)
            asked, complaints = [], []
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(url)
            page.wait_for_selector("#ask:enabled")
            yield page, asked, complaints
        finally:
            browser.close()


def set_stop(page, side, stop):
    """Move the slider of a side (0 left, 1 right) to a stop."""
    page.locator(".slider").nth(side).evaluate(
        "(slider, stop) => { slider.value = stop; slider.dispatchEvent(new Event('input')) }", stop
    )


def ask(page, question, image=None):
    """Ask, and wait for both answers; returns them."""
    if image is not None:
        page.set_input_files("#image", image)
        page.wait_for_selector("canvas >> nth=1")
    page.fill("#question", question)
    page.click("#ask")
    page.wait_for_selector("#ask:enabled")
    return page.locator(".answer").all_text_contents()


def main(model, image, question, target):
    sys.path[:0] = [str(Path(__file__).parents[1])]
    from servers import Server

    with tempfile.TemporaryDirectory() as folder:
        server = Server(model, Path(folder) / "log", command="demo")
        try:
            with opened(server.url) as (page, _, complaints):
                print(ask(page, question, image), page.locator(".figures").all_text_contents(), complaints)
                page.locator("canvas").nth(0).hover(position={"x": 200, "y": 200})
                page.locator("main").screenshot(path=target)
        finally:
            server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
