"""The benchmark's harness at tiny size on the CPU: what it times is right, and what it reports is what it measured."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import kernel_bench
import pytest
import torch
from kernel_bench import Case, Ceilings

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_bytes_per_s=1e12, flops_per_s=1e14)


class Tiny(Case):
    """A case of 6 x 6 patches."""

    grid = (6, 6)


CASES = [Tiny(8, 12, 3, (4,)), Tiny(8, 12, 4, (2, 3)), Tiny(8, 12, 2, (4,), frozen=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_pools_agree(case):
    features = torch.randn(case.num_patches, case.width)
    wanted = kernel_bench.adaptive_pool(features, case.grids, case.tokens)
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


def test_the_floor_is_products_and_bytes():
    case = Case(1152, 1536, 64, (16,))
    gate_up, down = 2 * 16384 * 1152 * 6912, 2 * 16384 * 3456 * 1536
    seconds = (gate_up + down) / 1e14 + 2 * 1152 * (64 * 729 + 16384) / 1e12
    assert kernel_bench.floor_ms(case, "forward", CEILINGS) == pytest.approx(1e3 * seconds)
    whole = kernel_bench.floor_ms(case, "both", CEILINGS)
    frozen = kernel_bench.floor_ms(case._replace(frozen=True), "both", CEILINGS)
    assert whole - frozen == pytest.approx(1e3 * gate_up / 1e14 + 2e3 * 1152 * (64 * 729 + 16384) / 1e12)


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
def test_make_gpu_needs_no_more_than_torch_triton_and_pytest(has_transformers, tmp_path):
    """What the target names is imported and collected where the trainer's other packages are missing."""
    packages = {"deepspeed", "webdataset", "pydantic", "hypothesis", "pytest_timeout", "liger_kernel"}
    packages |= set() if has_transformers else {"transformers", "huggingface_hub", "yaml", "PIL"}
    (tmp_path / "sitecustomize.py").write_text(BARE.format(packages=packages))
    root = Path(__file__).parents[3]
    options = "ARGS=--collect-only -q -p no:timeout -p no:hypothesispytest -p no:cacheprovider"
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("MAKE")
    }  # of `make test` itself
    command = ["make", "--no-print-directory", "-n", "gpu", options]
    recipe = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    recipe = recipe.replace("PYTHONPATH=", f"PYTHONPATH={tmp_path}:")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    end = subprocess.run(
        ["bash", "-c", recipe], cwd=root, capture_output=True, text=True, timeout=120, env={**environment, "PATH": path}
    )
    assert end.returncode == 0, end.stdout[-3000:] + end.stderr[-3000:]
    for name in ("test_projector[1152-1536-b64-n8]", "test_splice[16384", "test_pooling_rounds_once"):
        assert name in end.stdout
    assert ("test_torchs_own_on_a_gpu" in end.stdout) is has_transformers
