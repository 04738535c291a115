"""A real SLURM cluster of four nodes on this machine: its own munged, slurmctld and one slurmd per node, in a folder."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

SBIN = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")

# Nodes share the host, so node names are no host names. TaskProlog gives single nodes an environment of their own, which
# is how tests break one of them. A requeued job waits for the credentials of its first start to expire: seconds here.
CONF = """
ClusterName=tokenflex
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/task-prolog
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=40
SlurmdTimeout=10
MinJobAge=3600
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=40
PartitionName=gpu Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=40
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=9
"""


class Cluster:
    """Start, break and stop it; `run` runs SLURM's commands against it."""

    def __init__(self, folder, num_nodes=4):
        self.folder = Path(folder)
        self.nodes = [f"node{number}" for number in range(num_nodes)]
        self.environment = {**os.environ, "PATH": SBIN, "SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SLURM_JOB", "SBATCH_", "TOKENFLEX_"))]:
            del self.environment[name]

    def start(self):
        missing = [program for program in PROGRAMS if shutil.which(program, path=SBIN) is None]
        if missing or os.geteuid():
            why = f"{', '.join(missing)} missing" if missing else "its daemons run as root, this user is not"
            raise RuntimeError(f"no SLURM test cluster: {why}; run `make test-slurm`, which installs it, as root")
        (self.folder / "state").mkdir()
        (self.folder / "node-environment").mkdir()
        prolog = self.folder / "task-prolog"
        prolog.write_text(
            f'#!/bin/sh\nfile="{self.folder}/node-environment/$SLURMD_NODENAME"\n[ ! -f "$file" ] || cat "$file"\n'
        )
        prolog.chmod(0o755)
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000"
            for node, port in zip(self.nodes, ports[1:])
        )
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, host=host, ports=ports, nodes=nodes))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "key-file": key.name, "pid-file": "munged.pid", "seed-file": "munged.seed"}
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self._daemon("munged", "--force", f"--log-file={self.folder}/munged.log", *options)
        self._daemon("slurmctld", "-f", self.environment["SLURM_CONF"])
        for node in self.nodes:
            self.start_node(node)
        self.wait(
            lambda: self.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%T").split() == ["idle"] * len(self.nodes)
        )

    def stop(self):
        """End jobs and daemons; nothing stays behind."""
        self.run("scancel", "--user=root", "--signal=KILL", "--full")
        self.run("scancel", "--user=root")
        try:
            self.wait(lambda: not self.run("squeue", "-h"), timeout_s=60)
        finally:
            for name in [*self.nodes, "slurmctld", "munged"]:
                self._end(self.folder / f"{name}.pid", signal.SIGTERM)

    def start_node(self, node):
        """One processor of this machine each, in turn, so that ranks do not fight over all of them."""
        processors = sorted(os.sched_getaffinity(0))
        processor = processors[self.nodes.index(node) % len(processors)]
        self._daemon("taskset", "-c", processor, "slurmd", "-f", self.environment["SLURM_CONF"], "-N", node)

    def kill_slurmd(self, node):
        """The daemon alone; what it had started goes on."""
        self._end(self.folder / f"{node}.pid", signal.SIGKILL)

    def kill_node(self, node):
        """All that runs on a node, as when its power fails."""
        self.kill_slurmd(node)
        tasks = [pid for pid, environment in processes() if environment.get("SLURMD_NODENAME") == node]
        steps = {parent_of(pid) for pid in tasks}
        for pid in [*(pid for pid in steps if pid and "slurmstepd" in name_of(pid)), *tasks]:
            _kill(pid, signal.SIGKILL)

    def set_node_environment(self, node, **variables):
        """Variables for tasks on one node only; none takes them away."""
        path = self.folder / "node-environment" / node
        path.write_text("".join(f"export {name}={value}\n" for name, value in variables.items()))

    def run(self, *command, cwd=None, environment=None, check=True):
        """Standard output of a command."""
        done = subprocess.run(
            [str(part) for part in command],
            env={**self.environment, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: status {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def job(self, job_id):
        """What SLURM says of a job: {"JobState": ..., "Restarts": ..., ...}."""
        text = self.run("scontrol", "show", "job", "--oneliner", job_id)
        return dict(field.partition("=")[::2] for field in text.split() if "=" in field)

    def wait(self, condition, timeout_s=240, what="", interval_s=0.5):
        """Wait until `condition()` holds; returns its value. What asks SLURM costs processes: look seldom."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"waited {timeout_s} s for {what or 'the cluster'}\n{self.run('squeue', check=False)}"
                )
            time.sleep(interval_s)
        return value

    def _daemon(self, *command):
        self.run(*command)

    def _end(self, pid_file, number):
        if not pid_file.is_file():
            return
        pid = int(pid_file.read_text())
        _kill(pid, number)
        self.wait(lambda: not is_running(pid), timeout_s=30, what=f"{pid_file.stem} to end")
        pid_file.unlink(missing_ok=True)


def processes():
    """(pid, environment) of every process that still has one."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            entries = (path / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        yield int(path.name), dict(entry.partition("=")[::2] for entry in entries if "=" in entry)


def parent_of(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def is_running(pid):
    """Whether a process is there and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def name_of(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _kill(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _free_ports(number):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
