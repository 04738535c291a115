"""The benchmark's harness at tiny size on the CPU: what it times is right, and what it reports is what it measured."""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))  # the kernels' tests, whose helpers are shared
import gpu_run  # noqa: E402
import kernel_bench  # noqa: E402
from kernel_bench import Case, Ceilings  # noqa: E402

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_bytes_per_s=1e12, flops_per_s=1e14)


class Tiny(Case):
    """A case of 6 x 6 patches."""

    grid = (6, 6)


CASES = [Tiny(8, 12, 3, (4,)), Tiny(8, 12, 4, (2, 3)), Tiny(8, 12, 2, (4,), frozen=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_pools_agree(case):
    features = torch.randn(case.num_patches, case.width)
    wanted = kernel_bench.our_pool(features, case)
    pools = [
        kernel_bench.eager_pool,
        kernel_bench.loop_pool,
        *([kernel_bench.dense_pool] if len(case.sides) == 1 else []),
    ]
    for pool in pools:
        torch.testing.assert_close(pool(features, case), wanted)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_gives_its_rows(case):
    functions = {"eager": kernel_bench.eager}
    rows = kernel_bench.bench_projector(case, CPU, torch.float32, CEILINGS, functions, num_rounds=2)
    assert [entry["part"] for entry in rows] == ["forward", "both", "backward"]
    for entry in rows:
        assert set(entry["peers"]) == {"eager"} and not entry["excluded"] and entry["floor_ms"] > 0
    rows = kernel_bench.bench_pool(case, CPU, torch.float32, CEILINGS, num_rounds=2)
    assert [entry["part"] for entry in rows] == ["forward", "backward"]
    (entry,) = kernel_bench.bench_splice(12, 5, 8, CPU, torch.float32, CEILINGS, num_rounds=2)
    assert "masked_scatter" in entry["peers"]


def test_a_wrong_peer_is_left_out_and_a_wrong_kernel_stops_the_run(monkeypatch):
    half = lambda case, tensors: kernel_bench.eager(case, tensors) / 2  # noqa: E731
    rows = kernel_bench.bench_projector(CASES[0], CPU, torch.float32, CEILINGS, {"half": half}, num_rounds=1)
    assert rows[0]["excluded"]["half"].startswith("off by 0.5") and not rows[0]["peers"]
    monkeypatch.setattr(kernel_bench, "ours", half)
    with pytest.raises(AssertionError, match="our gradients are off by"):
        kernel_bench.bench_projector(CASES[0], CPU, torch.float32, CEILINGS, {}, num_rounds=1)


def test_rounds_take_turns_and_ratios_pair_within_a_round():
    order, clock = [], iter(range(1, 100))
    functions = {name: (lambda name=name: order.append(name)) for name in ("ours", "a", "b")}
    times = kernel_bench.interleaved(
        functions, num_rounds=4, timer=lambda function: (function(), float(next(clock)))[1]
    )
    assert sorted(order) == sorted(["ours", "a", "b"] * 4) and len({tuple(order[i : i + 3]) for i in (0, 3, 6, 9)}) > 1
    assert all(len(by_round) == 4 for by_round in times.values())
    assert kernel_bench.ratios([1.0, 2.0, 4.0], [2.0, 2.0, 12.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_the_floor_is_the_cases_own_products_and_bytes():
    case = Case(1152, 1536, 64, (16,))
    pool_ms = 1e3 * 2 * 1152 * (64 * 729 + 16384) / 1e12
    products = {"forward": 3.0, "backward": 5.0}
    assert kernel_bench.floor_ms(case, "forward", CEILINGS, products) == pytest.approx(3 + pool_ms)
    assert kernel_bench.floor_ms(case, "both", CEILINGS, products) == pytest.approx(8 + 2 * pool_ms)
    frozen = case._replace(frozen=True)
    assert kernel_bench.floor_ms(frozen, "both", CEILINGS, products) == pytest.approx(8 + pool_ms)
    timed = lambda case: kernel_bench.bare_products_ms(case, CPU, torch.float32, lambda product: (product(), 1.0)[1])  # noqa: E731
    assert timed(CASES[0]) == {"forward": 2.0, "backward": 4.0} and timed(CASES[2])["backward"] == 3.0


def test_ceilings_are_rates(monkeypatch):
    ceilings = kernel_bench.measure_ceilings(
        CPU, torch.float32, num_bytes=4096, side=16, timer=lambda function: (function(), 2.0)[1]
    )
    assert ceilings == Ceilings(2 * 4096 / 2e-3, 2 * 16**3 / 2e-3)


def test_the_report_is_json_and_the_plot_is_svg(tmp_path):
    rows = kernel_bench.bench_projector(
        CASES[0], CPU, torch.float32, CEILINGS, {"eager": kernel_bench.eager}, num_rounds=2
    )
    as_json, as_svg = kernel_bench.write_report(tmp_path / "results", "kernels-cpu", CPU, CEILINGS, rows)
    report = json.loads(as_json.read_text())
    assert report["rows"] == rows and report["device"] == "cpu" and "torch" in report["versions"]
    drawn = ET.fromstring(as_svg.read_text())
    assert any(element.text == "8-12-b3-n4" for element in drawn.iter())
    assert "8-12-b3-n4" in kernel_bench.table(rows)


def test_the_cases_are_the_promised_ones():
    assert len(kernel_bench.ALL_CASES) == 5 * 3 * 4 and len({case.name for case in kernel_bench.ALL_CASES}) == 60
    assert {case._replace(frozen=False) for case in kernel_bench.CORE_CASES} <= set(kernel_bench.ALL_CASES)
    names = kernel_bench.case_names()
    assert len(names) == len(set(names)) and names[:2] == ["projector 1152-1536-b64-n16", "projector 1152-3584-b64-n16"]
    ragged = Case(1152, 1536, 64, (8, 12, 16))
    assert ragged.num_tokens == 22 * 64 + 21 * 144 + 21 * 256 and ragged.name == "1152-1536-b64-ragged"


BARE = """
import importlib.machinery, sys
class Wall(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {packages} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Wall
"""


@pytest.mark.parametrize("has_transformers", [True, False])
def test_make_gpu_needs_no_more_than_torch_triton_and_pytest(has_transformers, tmp_path, monkeypatch):
    """What its stages start is imported and collected where the trainer's other packages are missing."""
    packages = {"deepspeed", "webdataset", "pydantic", "hypothesis", "pytest_timeout", "liger_kernel"}
    packages |= set() if has_transformers else {"transformers", "huggingface_hub", "yaml", "PIL"}
    (tmp_path / "sitecustomize.py").write_text(BARE.format(packages=packages))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = ["--collect-only", "-p", "no:timeout", "-p", "no:hypothesispytest", "-p", "no:cacheprovider"]
    status, output = gpu_run.run([*gpu_run.PYTEST, *options], 120)
    assert status == 0, output[-3000:]
    assert "test_pooling_rounds_once" in output and ("test_torchs_own_on_a_gpu" in output) is has_transformers
    if not has_transformers:
        status, output = gpu_run.run([gpu_run.BENCH], 60)
        assert status == 0 and output.splitlines() == kernel_bench.case_names()


def test_make_gpu_fails_where_there_is_none(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "ARGS"} | {
        "OUT": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    end = subprocess.run(
        ["make", "gpu"], cwd=gpu_run.ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert end.returncode != 0 and "no NVIDIA GPU" in end.stdout and not list(tmp_path.iterdir())


def test_a_hung_process_is_killed_with_its_children_and_what_it_said_is_kept(tmp_path):
    code = (
        "import signal, subprocess, sys, time\n"
        "for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('{\"pid\": %d}' % child.pid, flush=True)\n"
        "print('{\"cut', flush=True)\n"
        "time.sleep(60)\n"
    )
    status, output = gpu_run.run(["-c", code], 3)
    assert status == "killed after 3 s"
    (said,) = gpu_run.json_lines(output)
    for _ in range(50):
        if not Path(f"/proc/{said['pid']}").exists() or "Z" in Path(f"/proc/{said['pid']}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child lives on")


def test_the_stages_write_what_they_know_and_leave_the_wrong_out(tmp_path, monkeypatch):
    """With stand-ins for the processes: one configuration wrong, one killed, one right; then the benchmarks."""
    lines = {"good": [None, None], "bad": [None, "off by 1"], "hung": [None]}
    asked = []

    def run(arguments, seconds, log=None):
        if arguments == [gpu_run.CASES]:
            return 0, "".join(f"gated {name}\n" for name in lines) + "gated unfused\n"
        if arguments == [gpu_run.BENCH]:
            return 0, "projector a\nprojector b\n"
        if arguments[0] == gpu_run.CASES:
            kernel, name = arguments[1:]
            results = [{"case": [kernel, name, f"p{i}"], "error": e} for i, e in enumerate(lines.get(name, [None]))]
            return "killed after 45 s" if name == "hung" else 0, "\n".join(map(json.dumps, results))
        asked.append(arguments)
        return (0, 'noise\n{"rows": []}') if arguments[1] == "projector a" else (-9, "no")

    monkeypatch.setattr(gpu_run, "run", run)
    report = gpu_run.Report(tmp_path / "out", "AC")
    gpu_run.check_all(report, time.monotonic() + 60)
    gpu_run.bench_all(report, time.monotonic() + 60)
    written = json.loads((tmp_path / "out" / "kernels-gpu.json").read_text())
    assert set(written["wrong"]) == {"gated bad", "gated hung"} and written["right"] == {
        "gated good": 2,
        "gated unfused": 1,
    }
    assert written["cases"] == {"projector a": {"rows": []}, "projector b": "-9: no"}
    assert all(sorted(a[3:]) == ["bad", "gated", "gated", "hung"] for a in asked)
    gpu_run.bench_all(report, time.monotonic() + 10)
    assert report.data["not_run"] == ["projector a", "projector b"]


@pytest.mark.parametrize(("stages", "status", "wanted"), [("D", 0, 0), ("D", 3, 1), ("B", 0, 0)])
def test_whole_steps_are_a_stage_that_is_asked_for(stages, status, wanted, tmp_path, monkeypatch):
    asked = []

    def run(arguments, seconds, log=None):
        asked.append(arguments)
        return status if len(asked) > 1 else 0, ""

    monkeypatch.setattr(gpu_run, "run", run)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--stages", stages])
    assert gpu_run.main() == wanted
    training = [arguments for arguments in asked if gpu_run.TRAINING in arguments]
    assert training == ([[gpu_run.TRAINING, "--out", str(tmp_path / "train-speed-gpu.json")]] if stages == "D" else [])
    written = json.loads((tmp_path / "kernels-gpu.json").read_text())
    assert written["training"] == (status if stages == "D" else "not run")
