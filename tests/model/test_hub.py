"""A hub id that cannot be had says so in one line and within seconds; one that lies in the cache works without the hub."""

import ast
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, TINY
from huggingface_hub import constants

from tokenflex.errors import UserError
from tokenflex.model.hub import hub_options

REVISION = "0" * 40
ASK = """
import json, sys, time
from tokenflex.config import load_config
from tokenflex.errors import UserError
from tokenflex.model import build_processor
from tokenflex.model.build import vision_config
answers = {}
for source in sys.argv[2:]:
    config = load_config(sys.argv[1], [f"model.tokenizer={source}", f"model.vision={source}"])
    start = time.perf_counter()
    said = ""
    try:
        said = vision_config(config.model).model_type
        build_processor(config.model, config.budget)
    except UserError as error:
        said = f'{said} {error}'
    answers[source] = (said, time.perf_counter() - start)
print(json.dumps(answers))
"""


class Hub(BaseHTTPRequestHandler):
    """Has no model but one that is gated; one name is never answered."""

    def do_HEAD(self):
        if "/silent" in self.path:
            time.sleep(30)
        self.send_response(403 if "/gated" in self.path else 404)
        self.send_header("X-Error-Code", "GatedRepo" if "/gated" in self.path else "RepoNotFound")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def hub_address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def refused_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{free.getsockname()[1]}"  # bound and not listening


def ask(address, home, *sources):
    """{source: (what came, seconds)} of a process whose hub is at `address`, with one encoder's configuration in its cache."""
    snapshot = home / "hub" / "models--owner--cached"
    (snapshot / "snapshots" / REVISION).mkdir(parents=True, exist_ok=True)
    (snapshot / "refs").mkdir(exist_ok=True)
    (snapshot / "refs" / "main").write_text(REVISION)
    (snapshot / "snapshots" / REVISION / "config.json").write_text(json.dumps({"model_type": "vit"}))
    variables = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home)}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, ROOT / "kernels"]))
    command = [sys.executable, "-c", ASK, str(TINY), *sources]
    end = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280, check=True)
    return json.loads(end.stdout.splitlines()[-1])


def test_a_hub_out_of_reach(refused_address, tmp_path):
    came = ask(refused_address, tmp_path, "nobody/none", "owner/cached", "/no/such/folder")
    said, seconds = came["nobody/none"]
    assert f" model.vision: nobody/none is no folder here, and the hub {refused_address} cannot be reached" in said
    assert seconds < 15, "transformers itself takes 20 s and more per file"
    said, seconds = came["owner/cached"]
    assert said.startswith("vit model.tokenizer: hub id or folder owner/cached cannot be loaded"), (
        "its config alone is there"
    )
    assert seconds < 15
    assert came["/no/such/folder"][0].startswith(
        " model.vision: /no/such/folder is no folder here, and no hub id either"
    )


def test_a_hub_that_answers_no_or_not_at_all(hub_address, tmp_path):
    came = ask(hub_address, tmp_path, "nobody/none", "nobody/gated", "nobody/silent")
    for name in ("nobody/none", "nobody/gated"):
        assert f" model.vision: {name} is no folder here, and the hub has no model of this name" in came[name][0]
    said, seconds = came["nobody/silent"]
    assert "cannot be reached (ReadTimeout within 5 s)" in said and seconds < 15


def test_where_the_hub_is_forbidden(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/offline is no folder here, and HF_HUB_OFFLINE forbids asking the hub"):
        hub_options("model.text", "nobody/offline")


def test_every_loader_asks_first():
    """Whatever in the package calls `from_pretrained` hands on what `hub_options` gave, or has looked for the folder itself."""
    for path in (ROOT / "tokenflex").rglob("*.py"):
        text = path.read_text()
        if "is_exported(" in text:  # of a folder that is there
            continue
        for call in [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]:
            if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained":
                spread = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]
                assert "hub" in spread, f"{path.name}:{call.lineno} asks the hub by itself"


def test_inspecting_data_says_so_too(refused_address, corpus, tmp_path):
    """The one command with a recipe that runs under no launcher; train, evaluate and index build the same processor."""
    variables = {**os.environ, "HF_ENDPOINT": refused_address, "HF_HOME": str(tmp_path)}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, ROOT / "kernels"]))
    command = [sys.executable, "-m", "tokenflex.cli", "data", "inspect", str(corpus / "train"), "--config", str(TINY)]
    command += ["--out", str(tmp_path / "page.html"), "--set", "model.tokenizer=nobody/none"]
    end = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280)
    assert end.returncode == 2 and "cannot be reached" in end.stderr, end.stderr
    assert len(end.stderr.strip().splitlines()) == 1, end.stderr
