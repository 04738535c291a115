"""What the suite's own switches do."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--no-skips"], 1)])
@pytest.mark.parametrize("text", ["def test(): pytest.skip('no')", "pytest.importorskip('nothing_of_this_name')"])
def test_a_command_that_brings_what_its_tests_need_is_not_green_without_it(text, options, status, tmp_path):
    (tmp_path / "test_skipped.py").write_text(f"import pytest\n\ndef test_passes(): pass\n{text}\n")
    (tmp_path / "test_passes.py").write_text("def test_it(): pass\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "-c",
        os.devnull,
        "--rootdir",
        tmp_path,
        *options,
        tmp_path,
    ]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
    end = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert end.returncode == status and "skipped" in end.stdout, end.stdout + end.stderr
