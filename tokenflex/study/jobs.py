"""The runs of a study: each arm and seed as a process of the trainer, several at once, resumed where they were stopped."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import RunConfig, load_config
from ..data.sources import Here, open_data
from ..layout import DONE, REQUEUE, STOP_SIGNALS, RunLayout
from ..model import build_processor
from ..plan import Planner, Position
from .arms import FLEXIBLE, Arm

Say = Callable[[str], None]
TRAIN = Path(__file__).parent.parent.parent / "launch" / "train.py"


@dataclass(frozen=True)
class Job:
    """One arm at one seed."""

    arm: Arm
    seed: int
    num_steps: int

    @property
    def name(self) -> str:
        """Of its run."""
        return f"{self.arm.name}-seed{self.seed}"


@dataclass(frozen=True)
class Runs:
    """Where runs of a study come from and go.

    recipe_path: the base recipe. overrides: of all runs, after the recipe's own keys and before an arm's. base: the recipe with
    these, resolved. without_images: give the folders of training and of evaluation shards for the arm without images.
    """

    recipe_path: Path
    overrides: tuple[str, ...]
    base: RunConfig
    without_images: Sequence[Callable[[], Path]]

    def settings(self, job: Job) -> list[str]:
        """Every override of a job's run."""
        extra = []
        if job.arm.without_images:
            train, evaluation = (folder() for folder in self.without_images)
            extra = [f"data.train={train}", f"data.evaluation={evaluation}"]
            if self.base.model.tokenizer:
                extra.append(f"model.tokenizer={self.base.model.tokenizer}")
        return [*self.overrides, *extra, *job.arm.settings(job.num_steps, job.seed, job.name)]

    def config(self, job: Job) -> RunConfig:
        """The configuration of a job's run."""
        return load_config(self.recipe_path, self.settings(job))

    def layout(self, job: Job) -> RunLayout:
        """Where it is."""
        return RunLayout.of(self.config(job))


def jobs_of(
    runs: Runs, resolved: Callable[[RunConfig], RunConfig], arms: Sequence[Arm], seeds: Sequence[int]
) -> list[Job]:
    """The jobs, seed by seed, so that a study that is stopped has whole seeds.

    An arm that has as many samples as the flexible one takes its steps, since a pack of the recipe is full by its images; one
    that has as many tokens takes the steps that its own plan needs for them.
    """
    num_steps, jobs = runs.base.train.num_steps, []
    for seed in seeds:
        wanted = None
        for arm in arms:
            steps = num_steps
            if arm.equal == "tokens":
                wanted = wanted or float(
                    _tokens(runs, resolved, Job(Arm(name=FLEXIBLE, title=""), seed, num_steps), num_steps)[-1]
                )
                steps = _steps_with(
                    functools.partial(_tokens, runs, resolved, Job(arm, seed, num_steps)), wanted, num_steps
                )
            jobs.append(Job(arm, seed, steps))
    return jobs


def _steps_with(tokens: Callable[[int], np.ndarray], wanted: float, first: int) -> int:
    """The number of steps whose tokens come nearest to `wanted`."""
    number = first
    while (sums := tokens(number))[-1] < wanted:
        number *= 2
    return int(np.abs(sums - wanted).argmin()) + 1


def _tokens(runs: Runs, resolved: Callable[[RunConfig], RunConfig], job: Job, num_steps: int) -> np.ndarray:
    """Tokens of text and images after each of so many steps of a job's plan: [steps]."""
    config = resolved(runs.config(job))
    run = open_data(config, build_processor(config.model, config.budget), Here(), lambda text: None)
    return np.cumsum([tokens for _, tokens in zip(range(num_steps), tokens_per_step(run.planner))])


def tokens_per_step(planner: Planner) -> Iterator[int]:
    """Tokens of text and images of each step, without end."""
    for step in planner.steps_from(Position()):
        total = 0
        for pack in step.packs:
            text, _, tiles = planner.mixture.columns(pack.sample_ids)
            total += int(planner.budget.tokens(text, tiles, planner.budget.visual_tokens(pack.counts)).sum())
        yield total


class Workers:
    """Runs jobs as processes of one thread each, `number` at once; a stop signal is handed on to them and waited for.

    Args:
        made_by: what the runs are made by, in one word; a run that another has begun is begun anew.
        take_in: called with each job that has reached its end.
        say: told what begins, ends and fails.
    """

    def __init__(self, runs: Runs, number: int, made_by: str, take_in: Callable[[Job], None], say: Say):
        self.runs, self.number, self.made_by, self.take_in, self.say = runs, number, made_by, take_in, say
        self.is_stopped = False
        self.processes: list[subprocess.Popen] = []

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        """Train the jobs in their order; returns those that did not reach their end.

        A job that fails does not stop the others.
        """
        waiting, left = list(jobs), []
        running: list[_Running] = []
        previous = {name: signal.signal(name, self._stop) for name in (*STOP_SIGNALS, signal.SIGALRM)}
        try:
            while waiting or running:
                while waiting and len(running) < self.number and not self.is_stopped:
                    job = waiting.pop(0)
                    running.append(self._start(job))
                    self.say(f"begins    {job.name}, {job.num_steps} steps, {len(waiting)} after it")
                if self.is_stopped and not running:
                    break
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    self._end(one)
                    left += [] if one.process.returncode == DONE else [one.job]
                time.sleep(0.2)
        finally:
            for one in running:
                one.process.kill()
            for name, handler in previous.items():
                signal.signal(name, handler)
        return left + waiting

    def _start(self, job: Job) -> "_Running":
        folder = self.runs.layout(job).root
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        began_by = folder / "made_by.txt"
        is_ours = began_by.exists() and began_by.read_text() == self.made_by
        began_by.write_text(self.made_by)
        command = [sys.executable, str(TRAIN), "--config", str(self.runs.recipe_path), *self.runs.settings(job)]
        command += [] if is_ours else ["--fresh"]
        with open(log, "ab") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.processes.append(process)
        return _Running(job, process, time.monotonic(), log)

    def _stop(self, number: int, frame: Any) -> None:
        self.is_stopped = True
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def _end(self, one: "_Running") -> None:
        name, status = one.job.name, one.process.returncode
        if status == DONE:
            self.take_in(one.job)
            self.say(f"done      {name} in {time.monotonic() - one.began:.0f} s")
        elif status == REQUEUE or self.is_stopped:
            self.say(f"stopped   {name}; the same command goes on")
        else:
            lines = one.log.read_text(errors="replace").strip().splitlines()
            self.say(f"failed    {name} with status {status}: {lines[-1] if lines else ''} (see {one.log})")


class _Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    began: float
    log: Path


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
