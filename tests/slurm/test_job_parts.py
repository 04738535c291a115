"""The parts of a job that need no SLURM: its record of starts, its verdicts, its logs, the check of nodes, the shell."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_ranks
from hypothesis import given
from hypothesis import strategies as st

from tokenflex.config import load_config
from tokenflex.errors import UserError
from tokenflex.layout import DONE, REQUEUE, USER_ERROR, RunLayout
from tokenflex.parallel.environment import discover, tasks_per_node
from tokenflex.slurm import preflight
from tokenflex.slurm.attempts import Start, Starts, first_status, newest_step, outcome
from tokenflex.slurm.job import JobRun
from tokenflex.slurm.logs import MergedLog
from tokenflex.slurm.site import Job, read_site

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


def starts_at(path, *steps):
    return Starts(path, [Start(number, "1", ["a"], 0.0, step) for number, step in enumerate(steps)])


# starts and the cap on them


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_starts_without_progress_are_those_since_the_newest_checkpoint_moved(gains):
    steps = [sum(gains[:number]) for number in range(len(gains) + 1)]
    number = starts_at(Path("x"), *steps[:-1]).num_without_progress(steps[-1])
    assert 0 <= number <= len(gains)
    assert all(gain == 0 for gain in gains[len(gains) - number :])
    assert number == len(gains) or gains[len(gains) - number - 1] > 0


def test_the_record_of_starts_survives_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "deep" / "starts.json"
    assert Starts.load(path).starts == []
    starts = starts_at(path, 0, 5)
    starts.save()
    assert Starts.load(path) == starts
    path.write_text('[{"number": 0}]')
    with pytest.raises(UserError, match="not a record of starts .*remove it"):
        Starts.load(path)


def test_only_whole_checkpoints_count(tmp_path):
    assert newest_step(tmp_path / "none") == (0, 0.0)
    for name, mark in (
        ("step-00000004", "manifest.json"),
        ("step-00000012", None),
        ("step-00000099.tmp", "manifest.json"),
    ):
        (tmp_path / name).mkdir()
        if mark:
            (tmp_path / name / mark).write_text("{}")
    assert newest_step(tmp_path)[0] == 4


@pytest.mark.parametrize("srun_status, first, status", [
    (0, None, DONE),
    (75, (0, 75), REQUEUE),
    (137, (1, 75), REQUEUE),         # one rank stopped in time, the others were killed for its sake
    (137, (1, 2), 2),                # one rank found an error of the user's, likewise
    (75, (0, 1), 1),                 # an error came first; that others then stopped in order does not heal it
    (138, None, REQUEUE),            # USR1 before the ranks could listen
    (143, None, REQUEUE),            # TERM, likewise
    (137, None, 137),                # killed from outside
    (-9, None, 137),                 # srun itself killed
    (1, None, 1),
])  # fmt: skip
def test_the_first_rank_to_end_decides_what_the_job_says(srun_status, first, status):
    assert outcome(srun_status, first) == status


def test_the_first_status_is_by_time_and_passes_over_ranks_that_are_done(tmp_path):
    assert first_status(tmp_path) is None
    for order, (rank, status) in enumerate([(3, 0), (1, 75), (0, 1)]):
        path = tmp_path / f"rank-{rank}"
        path.write_text(f"{status}\n")
        os.utime(path, ns=(0, 10**9 * order))
    assert first_status(tmp_path) == (1, 75)


def job_run(tmp_path, *arguments, max_starts=3):
    site = read_site(
        {"TOKENFLEX_GPUS_PER_NODE": "0", "TOKENFLEX_MAX_STARTS_WITHOUT_PROGRESS": str(max_starts)}, sys.executable
    )
    job = Job(id="7", key="7", array_task="", num_restarts=0, nodes=("a", "b"), cpus_per_node=1, folder=str(tmp_path))
    run = JobRun(site, job, "train", arguments)
    run.checkpoints = tmp_path / "checkpoints"
    return run


def checkpoint(folder, step):
    folder = folder / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def test_a_job_that_gets_nowhere_is_not_started_a_fourth_time(tmp_path, capsys):
    run = job_run(tmp_path)
    assert run._refuse(starts_at(tmp_path / "s", 0, 0)) is None
    assert run._refuse(starts_at(tmp_path / "s", 0, 0, 0)) == 76
    assert "3 starts in a row left no checkpoint newer than step 0" in capsys.readouterr().err
    checkpoint(tmp_path, 5)
    assert run._refuse(starts_at(tmp_path / "s", 0, 0, 0)) is None
    assert run._refuse(starts_at(tmp_path / "s", 0, 5, 5, 5)) == 76


def test_fresh_holds_until_the_job_has_a_checkpoint_of_its_own(tmp_path):
    run = job_run(tmp_path, "--fresh", "a=1")
    checkpoint(tmp_path, 5)  # of another job, before
    starts = starts_at(tmp_path / "s", 5, 5)
    starts.starts[0].began = time.time() + 60
    assert run._arguments_of(starts) == ["--fresh", "a=1"]
    starts.starts[0].began = time.time() - 60
    assert run._arguments_of(starts) == ["a=1"]
    assert run._arguments_of(Starts(starts.path, starts.starts[:1])) == ["--fresh", "a=1"]


# logs


def test_the_merged_log_holds_every_line_of_every_rank_once(tmp_path, capsys):
    lines = {rank: [f"rank {rank} line {number} \u00e9" for number in range(200)] for rank in (0, 3)}
    with MergedLog(tmp_path):
        files = {rank: open(tmp_path / f"rank-{rank:05d}.log", "w") for rank in lines}  # noqa: SIM115
        for number in range(200):
            for rank, file in files.items():
                file.write(lines[rank][number][:7])
                file.flush()  # half a line must not be cut in two
                file.write(lines[rank][number][7:] + ("\n" if number < 199 else ""))
            if number % 70 == 0:
                time.sleep(0.3)
        for file in files.values():
            file.close()
    merged = (tmp_path / "merged.log").read_text()
    assert merged == capsys.readouterr().out
    for rank in lines:
        mark = f" [{rank:05d}] "
        assert [line.partition(mark)[2] for line in merged.splitlines() if mark in line] == lines[rank]


# the check of nodes: each node is a process of its own


def check_nodes(tmp_path, change=None, names=("node0", "node1", "node2", "node3"), started=None, timeout_s=10):
    """Run the check as these nodes; `change` maps a node to extra arguments and variables. Returns the problems."""
    folder = tmp_path / "nodes"
    folder.mkdir()
    (tmp_path / "disk").mkdir()
    processes = []
    for name in started or names:
        extra, variables = (change or {}).get(name, ([], {}))
        arguments = [f"--folder={folder}", f"--node={name}", "--interface=lo", f"--timeout-s={timeout_s}", *extra]
        arguments += [] if "--writable" in extra else ["--writable", str(tmp_path / "disk")]
        arguments += ["--nodes", *names]
        command = [sys.executable, str(ROOT / "slurm" / "preflight.py"), *arguments]
        processes.append(subprocess.Popen(command, env={**os.environ, **variables}))
    assert [process.wait(60) for process in processes] == [0] * len(processes)
    return preflight.problems(folder, names, 0)


def test_good_nodes_have_no_problems(tmp_path):
    assert check_nodes(tmp_path) == []
    report = json.loads((tmp_path / "nodes" / "report-node0.json").read_text())
    assert report["address"] == "127.0.0.1" and report["free_port"] in preflight.PORTS
    assert set(report["peers"]) == {"node1", "node2"}


def test_the_bad_node_is_named(tmp_path):
    """Each of three nodes has its own fault, and a fourth does not come up at all."""
    fake = tmp_path / "other" / "torch-1.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    (tmp_path / "file").write_text("")
    change = {
        "node1": ([], {"PYTHONPATH": str(fake.parent)}),
        "node2": (["--writable", str(tmp_path / "file" / "x")], {}),
        "node3": (["--interface=nope0"], {}),
    }
    names = ("node0", "node1", "node2", "node3", "node4")
    found = check_nodes(tmp_path, change, names, started=names[:4], timeout_s=3)
    by_node = {node: " / ".join(what for name, what in found if name == node) for node in names}
    assert by_node["node0"] == ""
    assert "has torch 1.0, the others have" in by_node["node1"]
    assert by_node["node2"] == f"cannot write to {tmp_path / 'file' / 'x'}: Not a directory"  # and was reached by all
    assert "nope0: No such device; TOKENFLEX_NETWORK_INTERFACE must be one of" in by_node["node3"]
    assert "did not report" in by_node["node4"]


def reports(folder, number=4, **changes):
    """Reports of nodes that are all well, but for `changes` of dotted keys: node -> {key: value}."""
    names = [f"n{rank}" for rank in range(number)]
    for name in names:
        report = {
            "versions": {"torch": "2"}, "address": "x", "free_port": 1, "disks": [{"path": "/", "error": "", "free_bytes": 1 << 40}],
            "gpus": {"names": ["H"] * 8, "error": ""},
            "peers": {peer: {"error": "", "offset_s": 0.01} for peer in preflight.peers_of(name, names)},
        }  # fmt: skip
        for path, value in changes.get(name, {}).items():
            *inner, last = path.split(".")
            place = report
            for key in inner:
                place = place[int(key) if isinstance(place, list) else key]
            place[last] = value
        (folder / f"report-{name}.json").write_text(json.dumps(report))
    return names


CUT = "10.0.0.1:1: timed out"


@pytest.mark.parametrize("changes, expected", [
    ({}, []),
    ({"n2": {"gpus.names": ["H"] * 7, "gpus.error": "GPU 7: ECC"}}, [("n2", "7 of 8 GPUs work: GPU 7: ECC")]),
    ({"n2": {"disks.0.free_bytes": 5 << 20}}, [("n2", "/: 5 MiB free, at least 1024 are wanted")]),
    ({"n3": {"peers.n0.offset_s": 7.0}}, [("n3", "its clock is off by +7.0 s against n0")]),
    ({f"n{k}": {"peers.n0.offset_s": 7.0} for k in (1, 2, 3)}, [("n0", "its clock is off by -7.0 s against the other nodes")]),
    ({"n1": {"peers.n3.error": CUT}}, [("n1", f"cannot reach n3: {CUT}")]),                              # n2 reaches it
    ({"n1": {"peers.n3.error": CUT}, "n2": {"peers.n3.error": CUT}}, [("n3", f"cannot be reached by n1, n2: {CUT}")]),
])  # fmt: skip
def test_reports_are_judged(tmp_path, changes, expected):
    assert preflight.problems(tmp_path, reports(tmp_path, **changes), 8) == expected


# who is where


def test_a_port_is_the_jobs_own_and_the_steps_sizes_count():
    base = {"SLURM_PROCID": "2", "SLURM_NTASKS": "99", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0"}
    base |= {
        "SLURM_STEP_TASKS_PER_NODE": "2,1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "5",
    }
    launch = discover(base)
    assert (launch.rank, launch.num_ranks, launch.local_rank, launch.local_num_ranks) == (2, 3, 0, 1)
    ports = {discover({**base, "SLURM_JOB_ID": str(job)}).master_port for job in range(5, 1005)}
    assert len(ports) == 1000 and max(ports) < 32768


@pytest.mark.parametrize("text, counts", [("4", [4]), ("4(x2),1", [4, 4, 1]), ("1(x3)", [1, 1, 1])])
def test_tasks_per_node(text, counts):
    assert tasks_per_node(text) == counts


def test_tasks_per_node_in_another_form_are_refused():
    with pytest.raises(UserError, match="wanted numbers such as"):
        tasks_per_node("4x2")


WORLD = """
from tokenflex import parallel
parallel.quiet_libraries()
launch = parallel.join()
import os, torch
os.environ["SLURMD_NODENAME"] = f"node{launch.rank}"
os.environ["LOCAL_WORLD_SIZE"] = "1"
ranks = parallel.join_ranks(parallel.join())
print(parallel.check_world(ranks))
for name, value in (("NUM_RANKS", "4"), ("NODES", "node1,node0"), ("NODES", "node0")):
    try:
        parallel.check_world(ranks, {**os.environ, f"TOKENFLEX_EXPECTED_{name}": value})
    except parallel.world.UserError as error:
        print("REFUSED", error)
torch.distributed.destroy_process_group()
"""


def test_a_world_that_is_not_the_allocation_is_refused_by_every_rank(tmp_path):
    (tmp_path / "world.py").write_text(WORLD)
    for end in run_ranks(2, [tmp_path / "world.py"]):
        lines = end.output.splitlines()
        assert "2 ranks on 2 nodes (node0: 0, node1: 1), started by torch" in lines
        refused = [line for line in lines if line.startswith("REFUSED")]
        assert len(refused) == 3, end.output
        assert "the allocation is for 4 ranks" in refused[0] and "nodes are node1, node0" in refused[1]


# exit statuses

SLEEPER = """
import sys, time
from tokenflex.cli.launching import entry_point
def main(arguments, say):
    print("ready", flush=True)
    time.sleep(60)
sys.exit(entry_point(main, None, is_job=True))
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_stop_signal_outside_of_the_loop_means_start_me_again(tmp_path, number):
    environment = {**os.environ, "TOKENFLEX_STATUS_DIR": str(tmp_path), "SLURM_PROCID": "3"}
    environment.pop("RANK", None)
    command = [sys.executable, "-c", SLEEPER]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(20) == REQUEUE
    assert (tmp_path / "rank-3").read_text() == "75\n"
    assert f"stopped by {number.name}" in process.stdout.read()


@pytest.mark.parametrize(
    "body, status", [("return 0", 0), ("return 75", 75), ("raise UserError('x')", 2), ("1 / 0", 1)]
)
def test_a_rank_leaves_its_status(tmp_path, body, status):
    code = f"import sys\nfrom tokenflex.cli.launching import *\nfrom tokenflex.cli.launching import UserError\ndef main(a, s):\n    {body}\n"
    code += "sys.exit(entry_point(main, type('A', (), {'debug': False})()))"
    environment = {**os.environ, "TOKENFLEX_STATUS_DIR": str(tmp_path), "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, cwd=ROOT)
    assert done.returncode == status
    assert (tmp_path / "rank-0").read_text() == f"{status}\n"


# recipes and settings


@pytest.mark.parametrize("recipe", ["pretrain", "enhance", "finetune"])
def test_recipes_of_real_models_load_strictly(recipe):
    config = load_config(ROOT / "configs" / f"{recipe}.yaml")
    assert config.name == recipe and config.budget.num_visual_tokens == (64, 144, 256)
    assert sum((config.model.image_size[0] // 14, config.model.image_size[1] // 14)) == 54
    trained = {part for part in ("vision", "projector", "text") if getattr(config.optimizer, part).train}
    assert (
        trained
        == {
            "pretrain": {"projector"},
            "enhance": {"vision", "projector"},
            "finetune": {"vision", "projector", "text"},
        }[recipe]
    )


def test_check_says_where_a_run_lives(tmp_path):
    command = [sys.executable, ROOT / "launch" / "train.py", "--check", "--config", ROOT / "configs" / "pretrain.yaml"]
    done = subprocess.run([*command, f"output_dir={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = RunLayout.of(load_config(command[-1], [f"output_dir={tmp_path}"]))
    described = json.loads(done.stdout)
    assert (described["folder"], described["checkpoints"]) == (str(folder.root), str(folder.checkpoints))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variables, part", [
    ({"TOKENFLEX_GPUS_PER_NODE": "eight"}, "TOKENFLEX_GPUS_PER_NODE='eight'; wanted a whole number"),
    ({"TOKENFLEX_GPUS_PER_NODE": "8", "TOKENFLEX_RANKS_PER_NODE": "4"}, "one rank is started per GPU"),
    ({"TOKENFLEX_MAX_STARTS_WITHOUT_PROGRESS": "0"}, "at least 1"),
])  # fmt: skip
def test_a_wrong_site_value_is_named(variables, part):
    with pytest.raises(UserError, match=part):
        read_site(variables, "python")


def test_ranks_in_a_container_start_through_it(tmp_path):
    """What srun is asked for; no container runs here."""
    base = {"TOKENFLEX_GPUS_PER_NODE": "4", "TOKENFLEX_CONTAINER_MOUNTS": "/data,/scratch"}
    job = Job(id="7", key="7", array_task="", num_restarts=0, nodes=("a", "b"), cpus_per_node=64, folder="/home/me")
    pyxis = JobRun(read_site({**base, "TOKENFLEX_CONTAINER": "/i/x.sqsh"}, "py"), job, "train", [])
    step = pyxis._step(2, 4, "none")
    assert "--container-image=/i/x.sqsh" in step and f"--container-mounts={ROOT}:{ROOT},/data,/scratch" in step
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--gres=gpu:4", "--cpus-per-task=16"} <= set(step)
    assert pyxis._python("a.py") == ["python3", "a.py"]
    apptainer = JobRun(read_site({**base, "TOKENFLEX_CONTAINER": "/i/x.sif"}, "py"), job, "train", [])
    assert not any("container" in option for option in apptainer._step(2, 4, "none"))
    assert apptainer._python("a.py")[:3] == ["apptainer", "exec", "--nv"]
    assert apptainer._python("a.py")[-3:] == ["/i/x.sif", "python3", "a.py"]


def test_a_host_without_any_package_can_drive_a_job(tmp_path):
    """Outside of a container there is nothing but Python: no site-packages on the path, and the job's half still works."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import tokenflex.slurm.job, tokenflex.slurm.preflight; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "'torch'" not in done.stdout and "'tokenflex.slurm.job'" in done.stdout


# the shell


def test_every_shell_script_is_shellcheck_clean():
    scripts = subprocess.run(["git", "ls-files", "*.sh"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = scripts.stdout.split()
    assert len(names) >= 6
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "--external-sources", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run_script(script, arguments, folder, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TOKENFLEX_"))}
    return subprocess.run(
        ["bash", script, *arguments], cwd=folder, env={**environment, **variables}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.stem not in ("lib", "site", "site.example")], ids=lambda path: path.stem
)
def test_without_a_site_file_a_script_says_what_to_do(script, tmp_path):
    done = run_script(script, [], tmp_path, TOKENFLEX_SITE=str(tmp_path / "none.sh"))
    assert done.returncode == USER_ERROR
    assert (
        done.stderr
        == f"error: no site file at {tmp_path}/none.sh: cp slurm/site.example.sh slurm/site.sh and fill it in\n"
    )


def test_a_copy_without_a_checkout_says_where_it_looked(tmp_path):
    copy = tmp_path / "slurm_script"
    copy.write_bytes((ROOT / "slurm" / "pretrain.sh").read_bytes())
    done = run_script(copy, [], tmp_path)
    assert done.returncode == USER_ERROR and done.stderr.startswith(f"error: no TokenFLEX checkout at {tmp_path}:")


HOSTILE = [
    "a b",
    "$(touch pwned)",
    "`touch pwned`",
    "'\"",
    "two\nlines",
    "*",
    "--",
    "; touch pwned",
    "%j",
    "\\n",
    "é",
    "",
]


def test_hostile_names_reach_sbatch_as_they_are(tmp_path):
    """From a checkout with such a name, to an sbatch that writes down what it was given."""
    place = tmp_path / 'it\'s $(touch pwned) "a b"\nc'
    place.mkdir()
    (place / "slurm").symlink_to(ROOT / "slurm")
    (place / "site.sh").write_text("export SBATCH_PARTITION=gpu\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text('#!/bin/bash\nprintf "%s\\0" "$SBATCH_PARTITION" "$@"\n')
    (programs / "sbatch").chmod(0o755)
    done = run_script(
        place / "slurm" / "pretrain.sh", HOSTILE, place, TOKENFLEX_SITE=str(place / "site.sh"),
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}", TOKENFLEX_ROOT=str(place),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\0") == ["gpu", f"{place}/slurm/pretrain.sh", *HOSTILE, ""]
    assert not list(tmp_path.rglob("pwned"))
