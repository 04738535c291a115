"""The Triton kernels themselves, run on the CPU by Triton's interpreter, in processes of their own.

The interpreter is switched on for a whole process, when the kernels are imported: TRITON_INTERPRET never reaches this one.
"""

import kernel_process
import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("cases, least", [("pool", 25), ("projector", 30), ("splice", 17)])
def test_kernels_under_the_interpreter(cases, least):
    process = kernel_process.python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--noconftest", "-c", "/dev/null", "--rootdir",
        kernel_process.HERE, f"interpreted_{cases}.py", TRITON_INTERPRET="1",
    )  # fmt: skip
    output = kernel_process.finish(process, timeout_s=240)
    summary = output.strip().splitlines()[-1]
    assert " passed" in summary and "failed" not in summary and "skipped" not in summary, output
    assert int(summary.split(" passed")[0]) >= least, summary
