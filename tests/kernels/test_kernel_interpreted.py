"""The Triton kernels themselves, run on the CPU by Triton's interpreter, in processes of their own.

The interpreter is switched on for a whole process, when the kernels are imported: TRITON_INTERPRET never reaches this one.
"""

import kernel_process
import pytest

pytest.importorskip("triton")


LEAST = {"projector": 34, "pool": 25, "cases": 8, "splice": 17}
"""Files interpreted_*.py, the longest first, and how many cases each must have."""


@pytest.fixture(scope="module")
def outputs():
    """File -> what pytest will have printed."""
    command = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--noconftest", "-c", "/dev/null")
    jobs = {
        name: ((*command, "--rootdir", kernel_process.HERE, f"interpreted_{name}.py"), {"TRITON_INTERPRET": "1"})
        for name in LEAST
    }
    with kernel_process.side_by_side(jobs) as outputs:
        yield outputs


@pytest.mark.parametrize("name", LEAST)
def test_kernels_under_the_interpreter(name, outputs):
    output = outputs[name].result()
    summary = output.strip().splitlines()[-1]
    assert " passed" in summary and "failed" not in summary and "skipped" not in summary, output
    assert int(summary.split(" passed")[0]) >= LEAST[name], summary
