"""Jobs of real ranks for the reliability tests, started by `forge.py`, and what they left behind in comparable form."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tokenflex.checkpoint import checked_manifest, tags

ROOT = Path(__file__).parent.parent.parent
RECIPE = Path(__file__).parent / "crash.yaml"


@dataclass
class Job:
    """How a job ended."""

    statuses: list
    hung: bool
    seconds: float
    outputs: list

    @property
    def output(self):
        return "\n".join(self.outputs)


class Forge:
    """Runs jobs one after another; each is a real `launch/train.py` on `num_ranks` processes."""

    def __init__(self, cache_dir, log):
        self.cache_dir = cache_dir
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "forge.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, folder, num_ranks, *overrides, faults="", signals=(), environment=None, timeout_s=120, flags=()):
        """Train into `folder`; `faults` as in tokenflex/failpoints.py; `signals` are (seconds, rank or "all", number)."""
        scratch = Path(folder) / "job"
        scratch.mkdir(parents=True, exist_ok=True)
        for pid in scratch.glob("*.pid"):
            pid.unlink()
        arguments = [
            "--config",
            str(RECIPE),
            f"output_dir={folder}",
            f"data.cache_dir={self.cache_dir}",
            *overrides,
            *flags,
        ]
        variables = {"TOKENFLEX_FAULTS": faults, "TOKENFLEX_FAULTS_DIR": str(scratch), **(environment or {})}
        job = {
            "num_ranks": num_ranks,
            "arguments": arguments,
            "environment": variables,
            "folder": str(scratch),
            "timeout_s": timeout_s,
            "signals": signals,
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the forge has ended"
        outputs = [(scratch / f"rank-{rank}.log").read_text() for rank in range(num_ranks)]
        return Job(**json.loads(answer), outputs=outputs)

    def done(self, *arguments, **options):
        """As a call, and every rank must have ended well."""
        job = self(*arguments, **options)
        assert set(job.statuses) == {0} and not job.hung, f"{job.statuses}\n{job.output[-6000:]}"
        return job

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait(timeout=30)


@dataclass(frozen=True)
class Trace:
    """What two runs must have in common to be the same run, bit for bit."""

    losses: dict
    samples: dict
    final: dict


def trace_of(folder, name="crash"):
    """The `Trace` of a run: its losses and norms by step, its sample ids by (rank, ranks, step), its last checkpoint's checksums.

    A place in the data that was run more than once must have had the same samples each time.
    """
    root = Path(folder) / name
    records = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: (record["loss"], record["grad_norm"]) for record in records}
    assert len(losses) == len(records), "a step is told twice"
    samples, at_position = {}, {}
    for path in root.glob("samples-*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            before = at_position.setdefault((path.stem, record["num_ranks"], *record["position"]), record["ids"])
            assert before == record["ids"], f"{path.name}: {record['position']} was run with other samples"
            samples[path.stem, record["num_ranks"], record["step"]] = record["ids"]
    newest = tags(root / "checkpoints")[-1]
    manifest = checked_manifest(root / "checkpoints" / newest)
    files = {file: entry["blake3"] for file, entry in manifest.files.items()}
    return Trace(losses, samples, {"step": manifest.step, "progress": manifest.progress, **files})


def write_result(name, **figures):
    """Enter one row of the report, docs/results/reliability.json; only where TOKENFLEX_REPORT asks for it."""
    if "TOKENFLEX_REPORT" not in os.environ:
        return
    path = ROOT / "docs" / "results" / "reliability.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report[name] = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    path.write_text(json.dumps(report, indent=1) + "\n")
