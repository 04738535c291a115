"""A save stops the step loop for the copy alone: held against DeepSpeed's own save of the same engine, side by side."""

import json

import pytest
from conftest import ROOT, run_ranks
from jobs import write_result


def measure(folder, width, num_layers):
    script = ROOT / "tests" / "benchmarks" / "checkpoint_cost.py"
    ends = run_ranks(2, [script, folder, width, num_layers], timeout_s=600)
    assert all(end.status == 0 for end in ends), ends[0].output[-3000:]
    (line,) = [line for line in ends[0].output.splitlines() if line.startswith("COST ")]
    return json.loads(line[5:])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_loop_stalls_a_tenth_of_deepspeeds_save_at_most(tmp_path):
    """And loading waits for the verification a tenth of its time at most, as that ran while the model was built."""
    record = measure(tmp_path, 1536, 16)
    write_result("cost of a save", **record)
    assert record["stall_share"] <= 0.10, record
    assert record["verify_share"] <= 0.10, record
    assert record["bytes"] <= record["deepspeed_bytes"], record
