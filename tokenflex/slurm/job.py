"""The batch script's work: check the nodes, start one rank per GPU by srun, follow their logs, decide about a requeue.

    slurm/job.py KIND ARGUMENT...      KIND: train, evaluate or index; the arguments are those of launch/KIND.py

Signals need no forwarding: SLURM sends them to every rank itself, the ranks agree on a stop, save, and end with status 75.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import UserError
from ..layout import BAD_NODE, DONE, NO_PROGRESS, REQUEUE, STOP_SIGNALS, USER_ERROR
from . import preflight
from .attempts import Start, Starts, first_status, newest_step, outcome
from .logs import MergedLog
from .site import Job, Site, array_is_one_at_a_time, job_state, read_job, read_site

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ("train", "evaluate", "index")
PREFLIGHT_TIMEOUT_S = 90
NODE_ANSWER_S = 60
NODE_FAILURE_S = 900
"""How long SLURM gets to notice that a node is gone: its SlurmdTimeout is 300 s by default."""
NUM_LINES_SHOWN = 15
LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
)
"""What another launcher may have left in the shell that submitted; ranks would believe it."""


def main(argv: Sequence[str]) -> int:
    """Run this batch script's job; returns its exit status."""
    try:
        site, job = read_site(os.environ, sys.executable), read_job(os.environ)
        if not argv or argv[0] not in KINDS:
            raise UserError(f"slurm/job.py: wanted one of {', '.join(KINDS)} first, got {argv[:1]}")
        return JobRun(site, job, argv[0], argv[1:]).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR


def say(text: str) -> None:
    """A line of the job's own log."""
    print(f"{time.strftime('%H:%M:%S')} [job] {text}", flush=True)


INTO_LOG = (
    *("bash", "-c"),
    'printf -v log "%s/rank-%05d.log" "$1" "$SLURM_PROCID"; shift; exec "$@" >>"$log" 2>&1',
    "rank",
)
"""Runs what follows with its output in the log of its rank under a folder. Not srun's --output: its patterns would give
% and \\ in the folder's name a meaning."""


class JobRun:
    """One start of one job, from the first check to the decision about the next."""

    def __init__(self, site: Site, job: Job, kind: str, arguments: Sequence[str]):
        self.site, self.job, self.kind, self.arguments = site, job, kind, list(arguments)
        self.script = ROOT / "launch" / f"{kind}.py"
        self.ranks_per_node = site.index_ranks_per_node if kind == "index" else site.ranks_per_node
        self.num_ranks = len(job.nodes) * self.ranks_per_node
        self.srun: subprocess.Popen | None = None
        self.is_disturbed = False

    def run(self) -> int:
        """Run the job's steps; returns the exit status, having asked for a requeue if that is due."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._forward)
        described = self.describe()
        home = Path(described["folder"]) / "slurm" / self.job.key
        self.checkpoints = Path(described["checkpoints"])
        starts = Starts.load(home / "starts.json")
        ended = self._chain_is_over(starts)
        if ended is not None:
            return ended
        stalled = self._refuse(starts)
        if stalled is not None:
            return stalled
        step, _ = newest_step(self.checkpoints)
        start = Start(len(starts.starts), self.job.id, list(self.job.nodes), time.time(), step)
        starts.starts.append(start)
        starts.save()
        folder = home / f"start-{start.number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        say(f"job {self.job.id}, start {start.number}: {self.num_ranks} ranks on {','.join(self.job.nodes)}; {folder}")
        start.status, start.decision = self._attempt(folder, described, starts)
        starts.save()
        say(f"{start.decision} (status {start.status}, newest checkpoint at step {newest_step(self.checkpoints)[0]})")
        if start.decision == "requeue":
            self._requeue()
        return start.status

    def describe(self) -> dict[str, Any]:
        """What launch/KIND.py says of the run it was asked for, by its --check: folders, or its own one-line error."""
        command = [*self._step(1, 1, "none"), *self._python(self.script), "--check", *self.arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=self._environment())
        if outcome(done.returncode, None) == REQUEUE:  # a stop came already now
            if self.job.num_restarts < self.site.max_starts_without_progress and self._state() == "RUNNING":
                self._requeue()
            raise SystemExit(REQUEUE)
        if done.returncode:
            raise SystemExit(done.returncode if done.returncode == USER_ERROR else 1)
        return json.loads(done.stdout.splitlines()[-1])

    def _attempt(self, folder: Path, described: dict[str, Any], starts: Starts) -> tuple[int, str]:
        """(status, decision) of the check of the nodes and the ranks' run."""
        rendezvous = self._check_nodes(folder / "nodes", described)
        if rendezvous is None:
            return BAD_NODE, "failed: not every node is fit"
        arguments = self._arguments_of(starts)
        (folder / "status").mkdir(exist_ok=True)
        environment = self._environment(
            MASTER_ADDR=rendezvous["address"],
            MASTER_PORT=str(rendezvous["free_port"]),
            TOKENFLEX_STATUS_DIR=str((folder / "status").absolute()),
            TOKENFLEX_EXPECTED_NODES=",".join(self.job.nodes),
            TOKENFLEX_EXPECTED_NUM_RANKS=str(self.num_ranks),
        )
        if self.site.interface:
            environment.update(GLOO_SOCKET_IFNAME=self.site.interface, NCCL_SOCKET_IFNAME=self.site.interface)
        mpi = self.site.mpi if self.kind == "index" else "none"
        step = self._step(len(self.job.nodes), self.ranks_per_node, mpi)
        command = [*step, *INTO_LOG, str(folder.absolute()), *self._python(self.script), *arguments]
        with MergedLog(folder):
            self.srun = subprocess.Popen(command, env=environment)
            srun_status = self.srun.wait()
        first = first_status(folder / "status")
        status = outcome(srun_status, first)
        return status, self._decide(status, first, folder, starts)

    def _decide(self, status: int, first: tuple[int, int] | None, folder: Path, starts: Starts) -> str:
        if status == DONE:
            return "done"
        if status != REQUEUE:
            self._show_culprit(first, folder)
        state = self._state()
        if state != "RUNNING":  # cancelled, or being requeued by SLURM itself: not ours to decide
            return f"stopped: SLURM says {state or 'nothing'} of the job"
        if status != REQUEUE:
            silent = self._silent_nodes(folder)
            return self._wait_for_slurm(silent) if silent else "failed: not requeued"
        if self.job.is_array:
            return "stopped: the next task of the array goes on"
        if starts.num_without_progress(newest_step(self.checkpoints)[0]) >= self.site.max_starts_without_progress:
            return "failed: no newer checkpoint after several starts"
        return "requeue"

    def _show_culprit(self, first: tuple[int, int] | None, folder: Path) -> None:
        if first is None:
            say("no rank left a status: killed from outside (memory, node); see what srun says above")
            return
        rank, status = first
        log = next(iter(sorted(folder.glob(f"rank-*{rank}.log"), key=lambda path: len(path.name))), None)
        node = self.job.nodes[rank // self.ranks_per_node]
        say(f"rank {rank} on {node} was the first to end, with status {status}; its log {log} ends with:")
        for line in log.read_text(errors="replace").splitlines()[-NUM_LINES_SHOWN:] if log else []:
            say(f"    {line}")

    def _silent_nodes(self, folder: Path) -> list[str]:
        """Nodes that no longer start a task, of those on which a rank ended without a word."""
        if len(list((folder / "status").glob("rank-*"))) == self.num_ranks:
            return []
        step = self._step(len(self.job.nodes), 1, "none", kills=False)
        command = [*step, "--overlap", "bash", "-c", 'echo "$SLURMD_NODENAME"']
        try:
            answers = subprocess.run(
                command, stdout=subprocess.PIPE, timeout=NODE_ANSWER_S, env=self._environment()
            ).stdout
        except subprocess.TimeoutExpired as late:
            answers = late.stdout or b""
        return [node for node in self.job.nodes if node not in answers.decode().split()]

    def _wait_for_slurm(self, silent: Sequence[str]) -> str:
        """The decision when nodes died: SLURM's, which notices by itself (SlurmdTimeout) and starts the job without them."""
        say(f"{', '.join(silent)} does not answer: waiting for SLURM to start this job on other nodes")
        deadline = time.monotonic() + NODE_FAILURE_S
        while time.monotonic() < deadline:
            state = job_state(self.job.id)
            if state != "RUNNING":
                return f"stopped: SLURM says {state or 'nothing'} of the job"
            time.sleep(2)
        return "requeue"

    def _state(self) -> str:
        """SLURM's word for the job, asked again if a signal came meanwhile: a requeue would undo a scancel."""
        while True:
            self.is_disturbed = False
            state = job_state(self.job.id)
            if not self.is_disturbed:
                return state

    def _requeue(self) -> None:
        if self.is_disturbed and self._state() != "RUNNING":
            say("not requeued: SLURM has ended the job meanwhile")
            return
        done = subprocess.run(["scontrol", "requeue", self.job.id], capture_output=True, text=True)
        if done.returncode:
            say(
                f"scontrol requeue: {' '.join(done.stderr.split())}; submit the same command again, it goes on from there"
            )

    def _chain_is_over(self, starts: Starts) -> int | None:
        """For a task of an array: the exit status if the chain has ended before it, else None."""
        if not self.job.is_array:
            return None
        if not array_is_one_at_a_time(self.job.id):
            raise UserError(
                f"job {self.job.id}: tasks of an array continue one run in turn: submit with --array=1-10%1"
            )
        last = starts.starts[-1] if starts.starts else None
        if last is None or not last.decision.startswith(("done", "failed")):
            return None
        say(f"task {self.job.array_task}: nothing to do, start {last.number} was the last ({last.decision})")
        return last.status

    def _refuse(self, starts: Starts) -> int | None:
        """The exit status if the job was started too often without getting on, else None."""
        step, _ = newest_step(self.checkpoints)
        number = starts.num_without_progress(step)
        if number < self.site.max_starts_without_progress:
            return None
        print(
            f"error: job {self.job.id}: {number} starts in a row left no checkpoint newer than step {step}; see "
            f"{starts.path.parent} for their logs; not started again (TOKENFLEX_MAX_STARTS_WITHOUT_PROGRESS)",
            file=sys.stderr,
            flush=True,
        )
        return NO_PROGRESS

    def _arguments_of(self, starts: Starts) -> list[str]:
        """The script's arguments; --fresh holds until this job has a checkpoint of its own, else a requeue would lose it."""
        step, written = newest_step(self.checkpoints)
        if "--fresh" in self.arguments and step and written >= starts.starts[0].began and len(starts.starts) > 1:
            say(f"--fresh was done by start 0: going on from step {step}")
            return [argument for argument in self.arguments if argument != "--fresh"]
        return self.arguments

    def _check_nodes(self, folder: Path, described: dict[str, Any]) -> dict[str, Any] | None:
        """The rendezvous {"address", "free_port"} if every node is fit; else None, having named those that are not."""
        folder.mkdir(exist_ok=True)
        writable = [described["folder"], *described["writable"], *self.site.writable]
        script = [str(ROOT / "slurm" / "preflight.py"), f"--folder={folder.absolute()}"]
        script += [f"--num-gpus={self.site.gpus_per_node if self.kind != 'index' else 0}"]
        script += [f"--interface={self.site.interface}", f"--seed={self.job.id}", "--writable", *writable]
        command = [*self._step(len(self.job.nodes), 1, "none", kills=False), *self._python(*script)]
        command += ["--nodes", *self.job.nodes]
        try:
            subprocess.run(command, env=self._environment(), timeout=PREFLIGHT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            say(f"the check of the nodes did not end within {PREFLIGHT_TIMEOUT_S} s")
        num_gpus = self.site.gpus_per_node if self.kind != "index" else 0
        found = preflight.problems(folder, self.job.nodes, num_gpus)
        for node, what in found:
            print(f"error: {node}: {what}", file=sys.stderr, flush=True)
        if found:
            bad = ",".join(dict.fromkeys(node for node, _ in found))
            say(f"nodes not fit: {bad}; submit with --exclude={bad} to go on without")
            return None
        return json.loads((folder / f"report-{self.job.nodes[0]}.json").read_text())

    def _step(self, num_nodes: int, ranks_per_node: int, mpi: str, kills: bool = True) -> list[str]:
        """srun and its options for a step of `ranks_per_node` tasks on each of `num_nodes` nodes."""
        command = ["srun", f"--nodes={num_nodes}", f"--ntasks={num_nodes * ranks_per_node}", f"--mpi={mpi}"]
        command += [f"--ntasks-per-node={ranks_per_node}", f"--kill-on-bad-exit={int(kills)}"]
        command += [f"--cpus-per-task={max(1, self.job.cpus_per_node // ranks_per_node)}", "--input=none"]
        if self.site.gpus_per_node:
            command += [f"--gres=gpu:{self.site.gpus_per_node}"]  # each rank sees all of its node's and takes its own
        if self.site.container and not self.site.container.endswith(".sif"):
            command += [f"--container-image={self.site.container}", f"--container-workdir={self.job.folder}"]
            mounts = [f"{ROOT}:{ROOT}", *([self.site.container_mounts] if self.site.container_mounts else [])]
            command += [f"--container-mounts={','.join(mounts)}"]
        return command

    def _python(self, *arguments: object) -> list[str]:
        """The interpreter that ranks run, with a script and its arguments, within the container if there is one."""
        prefix = []
        if self.site.container.endswith(".sif"):
            mounts = [item for item in self.site.container_mounts.split(",") if item]
            binds = [option for item in (str(ROOT), *mounts) for option in ("--bind", item)]
            prefix = ["apptainer", "exec", *(["--nv"] if self.site.gpus_per_node else []), *binds, self.site.container]
        return [*prefix, self.site.python, *map(str, arguments)]

    def _environment(self, **variables: str) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        # this checkout's code runs, whichever one the environment was made from
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        return {**environment, **variables}

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """A signal that reached this process: the ranks have it from SLURM as well, except with --signal=B:..."""
        self.is_disturbed = True
        say(f"got {signal.Signals(number).name}; the ranks save and end")
        if number == signal.SIGUSR1 and self.srun is not None and self.srun.poll() is None:
            self.srun.send_signal(number)  # srun hands USR1 on to its tasks; twice does no harm
