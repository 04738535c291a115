"""The kernels' one visit to a GPU: right first, then tests, then figures. `make gpu` runs this; it needs torch, Triton, pytest.

Every stage is processes of its own, ended by SIGKILL when their time is up: one bad kernel costs its own case. Results are
written after every case, under $OUT where that is set, else docs/results. Without a GPU this fails.

    A  every kernel x configuration x pattern of kernel_cases.py against float64, four processes at a time
    B  the GPU tests
    C  the benchmarks, the most telling first; a configuration that failed A is left out, by name
    D  whole training steps beside other trainers (`make bench-train`); not among the default ones, as it needs the trainer's packages

    python tests/kernels/gpu_run.py [--stages ABC] [--seconds 570]
"""

import argparse
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ["tests/kernels/test_kernel_gpu.py", "tests/model/test_attention.py", "tests/model/test_liger.py"]
PYTEST = ["-m", "pytest", "-q", "-x", "--noconftest", "-m", "gpu and not slow", *TESTS]
CASES, BENCH = "tests/kernels/kernel_cases.py", "tests/benchmarks/kernels/kernel_bench.py"
TRAINING = "tests/benchmarks/train/bench.py"
SECONDS = {"A": 90, "B": 150, "configuration": 45, "case": 100}  # at most, each; all within --seconds


def run(arguments, seconds, log=None):
    """(exit status or "killed after N s", standard output) of ``python *arguments`` and all it starts."""
    paths = [ROOT / "kernels", ROOT / "tests/kernels", ROOT / "tests/benchmarks/kernels", ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT if log else subprocess.PIPE,
    ) as process:  # fmt: skip
        status, output = None, ""
        try:
            output, errors = process.communicate(timeout=max(seconds, 1))
            status = process.returncode
            if status and errors:
                output += errors[-2000:]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # SIGINT does not end a process that waits for a hung kernel
            output, status = process.communicate()[0] or "", f"killed after {seconds:.0f} s"
    if log:
        log.write_text(output)
    return status, output


def json_lines(output):
    """The JSON objects among the lines of ``output``."""
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # cut off by the kill
    return found


class Report:
    """What is known so far, written at every change."""

    def __init__(self, folder, stages):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "kernels-gpu.json"
        self.data = {
            "stages": stages,
            "right": {},
            "wrong": {},
            "tests": "not run",
            "training": "not run",
            "cases": {},
            "not_run": [],
        }

    def write(self):
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1))
        part.replace(self.path)


def check_all(report, stop):
    """Stage A. A configuration is wrong if any pattern is, or its process fails or is killed."""
    status, output = run([CASES], stop - time.monotonic())
    names = [tuple(line.split()) for line in output.splitlines() if len(line.split()) == 2]
    if status != 0:
        report.data["wrong"]["the list of cases"] = f"{status}: {output[-2000:]}"
        return

    def check(name):
        left = stop - time.monotonic()
        if left < 5:
            return name, "not run", []
        return (name, *run([CASES, *name], min(left, SECONDS["configuration"])))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for done in concurrent.futures.as_completed([pool.submit(check, name) for name in names]):
            name, status, output = done.result()
            results = json_lines(output) if output else []
            wrong = {result["case"][2]: result["error"] for result in results if result["error"]}
            if status == "not run":
                report.data["not_run"].append(" ".join(name))
            elif wrong or status != 0:
                report.data["wrong"][" ".join(name)] = wrong or f"{status}: {output[-1000:]}"
            else:
                report.data["right"][" ".join(name)] = len(results)
            print("A", *name, "wrong" if wrong or status != 0 else f"right in {len(results)} patterns", flush=True)
            report.write()


def bench_all(report, stop):
    """Stage C."""
    status, output = run([BENCH], stop - time.monotonic())
    names = output.split("\n")[:-1] if status == 0 else []
    left_out = [
        word
        for name in report.data["wrong"]
        if len(name.split()) == 2 and "unfused" not in name
        for word in name.split()
    ]
    for name in names:
        left = stop - time.monotonic()
        if left < 20:
            report.data["not_run"].append(name)
            continue
        status, output = run([BENCH, name, "--left-out", *left_out], min(left, SECONDS["case"]))
        results = json_lines(output)
        report.data["cases"][name] = results[-1] if status == 0 and results else f"{status}: {output[-2000:]}"
        print("C", name, "done" if status == 0 else status, flush=True)
        report.write()
    if status != 0 and not names:
        report.data["cases"]["the list of cases"] = f"{status}: {output[-2000:]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="ABC")
    parser.add_argument("--seconds", type=float, default=570)
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    status, output = run(["-c", "import tokenflex_kernels, sys; sys.exit(not tokenflex_kernels.is_available())"], 60)
    if status != 0:
        print("make gpu: no NVIDIA GPU of compute capability 8.0 or newer that torch and Triton can use", output[-500:])
        return 1
    report = Report(Path(os.environ.get("OUT") or ROOT / "docs" / "results"), options.stages)
    if "A" in options.stages:
        check_all(report, min(end, time.monotonic() + SECONDS["A"]))
    if "B" in options.stages:
        seconds = min(end - time.monotonic(), SECONDS["B"])
        report.data["tests"], output = run(PYTEST, seconds, report.path.with_name("kernels-gpu-tests.log"))
        print(output[-3000:], flush=True)
    report.write()
    if "C" in options.stages:
        bench_all(report, end)
    if "D" in options.stages:
        record, log = (report.path.with_name(f"train-speed-gpu.{ending}") for ending in ("json", "log"))
        report.data["training"], output = run([TRAINING, "--out", str(record)], end - time.monotonic(), log)
        print(output[-3000:], flush=True)
    report.write()
    failed = [name for name, case in report.data["cases"].items() if isinstance(case, str)]
    print(
        f"wrong: {sorted(report.data['wrong'])}; tests: {report.data['tests']}; training: {report.data['training']}; failed cases: {failed}; {report.path}"
    )
    ended_well = all(report.data[stage] in (0, "not run") for stage in ("tests", "training"))
    return int(bool(report.data["wrong"] or failed or not ended_well))


if __name__ == "__main__":
    sys.exit(main())
