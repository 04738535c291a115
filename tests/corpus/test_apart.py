"""Parts that are pretrained in a process of its own have one machine's bits, whatever that process is begun from, and no orphans."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from tokenflex.corpus.apart import has_avx2, pretrain_apart
from tokenflex.errors import UserError


@pytest.mark.skipif(not has_avx2(), reason="a processor without AVX2 has sums of its own")
def test_sums_do_not_follow_the_settings_they_are_begun_under(tmp_path, monkeypatch):
    """In a process that heeds these settings the same steps have other bits."""
    folders = [pretrain_apart("language", tmp_path / "one", 0, num_steps=2)]
    for name, value in (("OMP_NUM_THREADS", "1"), ("ATEN_CPU_CAPABILITY", "default"), ("MKL_CBWR", "AVX2")):
        monkeypatch.setenv(name, value)
    folders.append(pretrain_apart("language", tmp_path / "two", 0, num_steps=2))
    one, two = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert one == two
    command = [sys.executable, "-m", "tokenflex.corpus.apart", "language", str(tmp_path / "heeding"), "0", "2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as heeding:
        assert heeding.wait() == 0
    assert (tmp_path / "heeding" / "model.safetensors").read_bytes() != one


def test_what_fails_there_is_one_line_here(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"pretraining the language into .*: ended with status 1: .*Error.*") as caught:
        pretrain_apart("language", tmp_path / "file" / "part", 0, num_steps=1)
    assert "\n" not in str(caught.value)


def test_it_ends_with_the_process_that_began_it(tmp_path):
    script = "import sys; from pathlib import Path; from tokenflex.corpus.apart import has_avx2, pretrain_apart; "
    script += "pretrain_apart('encoder', Path(sys.argv[1]), 0)"
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "part")], cwd=ROOT)
    try:
        children = _wait_for(lambda: _children(parent.pid))
        assert len(children) == 1
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _wait_for(lambda: not os.path.exists(f"/proc/{children[0]}"))
    assert not (tmp_path / "part").exists()


def _children(pid):
    """Process ids of the direct children of a process that were begun to pretrain."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and b"tokenflex.corpus.apart" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return found


def _wait_for(what, limit_s=60):
    deadline = time.monotonic() + limit_s
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found
