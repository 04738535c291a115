"""Microbenchmarks on a GPU; they write docs/results/kernels-<device>.json and .svg.

``pytest -s -m "gpu and not slow" tests/benchmarks/kernels`` runs the core cases in minutes; ``-m gpu`` the full product of
widths, batches and token budgets. With the variable BENCH_SECONDS no case starts later than that many seconds after the
first; those that did not are skipped by name and listed in the report.
"""

import os
import time
from pathlib import Path

import kernel_bench
import pytest
import torch
from tokenflex_kernels import is_available

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_available(), reason="needs an NVIDIA GPU of compute capability 8.0 or newer, and Triton"),
]
RESULTS = Path(__file__).parents[3] / "docs" / "results"
DTYPE = torch.bfloat16
EXTRA_CASES = [case for case in kernel_bench.ALL_CASES if case not in kernel_bench.CORE_CASES]


@pytest.fixture(scope="module")
def whole_run():
    """(device, ceilings, rows, names left out, when to start no more); the table is printed at the end."""
    device = torch.device("cuda")
    ceilings = kernel_bench.measure_ceilings(device, DTYPE)
    print(f"\ncopy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, product {ceilings.flops_per_s / 1e12:.0f} TFLOP/s")
    rows, left_out = [], []
    yield device, ceilings, rows, left_out, time.monotonic() + float(os.environ.get("BENCH_SECONDS", "inf"))
    print("\n" + kernel_bench.table(rows))


@pytest.fixture
def bench(whole_run, request):
    """(device, ceilings, rows). The report is written after every test: a run that is cut short has its rows."""
    device, ceilings, rows, left_out, last_start = whole_run
    is_late = time.monotonic() > last_start
    if is_late:
        left_out.append(request.node.name)
    else:
        yield device, ceilings, rows
    slug = torch.cuda.get_device_name().lower().replace(" ", "-")
    kernel_bench.write_report(RESULTS, f"kernels-{slug}", device, ceilings, rows, left_out)
    if is_late:
        pytest.skip("BENCH_SECONDS have passed")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "case", [case for case in kernel_bench.CORE_CASES if not case.frozen], ids=lambda case: case.name
)
def test_pool_and_products(case, bench):
    device, ceilings, rows = bench
    rows += kernel_bench.bench_pool(case, device, DTYPE, ceilings)
    rows += kernel_bench.bench_products(case, device, DTYPE)


@pytest.mark.parametrize("num_rows, num_visual, width", [(16384, 4096, 1536), (16384, 12288, 3584)])
def test_splice(num_rows, num_visual, width, bench):
    device, ceilings, rows = bench
    rows += kernel_bench.bench_splice(num_rows, num_visual, width, device, DTYPE, ceilings)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", kernel_bench.CORE_CASES, ids=lambda case: case.name)
def test_projector(case, bench):
    device, ceilings, rows = bench
    rows += kernel_bench.bench_projector(case, device, DTYPE, ceilings)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", EXTRA_CASES, ids=lambda case: case.name)
def test_every_other_projector(case, bench):
    test_projector(case, bench)
