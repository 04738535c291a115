"""Shared pieces of the suite: the tiny recipe, its corpus (built once per session), and ranks as real processes."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tokenflex.config import load_config

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.yaml"

needs_fused_loss = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="needs torch 2.13 or newer for the fused loss"
)

STRANGER = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tokenflex", "tokenflex_kernels"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)
sys.meta_path.insert(0, Wall())
import json
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, *rest = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
"""
"""Start of a program that has an exported model (its first argument) but cannot import this project's packages."""

sys.path.insert(0, str(ROOT / "tests" / "data"))  # its shards and bad samples serve other rooms' tests too

pytest_plugins = ["slurm.jobs"]  # fixtures of tests/slurm; a second file named conftest would hide this one

torch.set_num_threads(1)  # the suite shares two cores with the ranks that it starts


LONGEST = (
    "tests/train/test_run.py",
    "tests/data/test_bad_samples.py",
    "tests/kernels/test_kernel_interpreted.py",
    "tests/reliability/",
    "tests/kernels/",
    "tests/distributed/",
    "tests/train/",
)
"""Files that take minutes each: first, so that no worker ends with one of them while the others have nothing left to do (with
`--no-loadscope-reorder`, or xdist puts the files of most tests first)."""


def pytest_addoption(parser):
    parser.addoption(
        "--no-skips", action="store_true", help="a skipped test is a failure: for commands that bring what tests need"
    )


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # none in a worker of xdist
    if session.config.getoption("--no-skips") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(items):
    def place(item):
        return next((number for number, prefix in enumerate(LONGEST) if item.nodeid.startswith(prefix)), len(LONGEST))

    items.sort(key=place)  # stable: within a file nothing moves


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One folder for everything that is built once per session: the embedded corpus and its index."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_config(cache_dir):
    from tokenflex.corpus import resolve_embedded

    return resolve_embedded(load_config(TINY, [f"data.cache_dir={cache_dir}"]), say=lambda text: None)


@pytest.fixture(scope="session")
def corpus(tiny_config):
    """Folder of the embedded corpus."""
    return Path(tiny_config.data.train[0]).parent


@pytest.fixture(scope="session")
def processor(tiny_config):
    from tokenflex.model import build_processor

    return build_processor(tiny_config.model, tiny_config.budget)


@pytest.fixture(scope="session")
def index(corpus, processor):
    from tokenflex.data import Limits, find_shards, load_or_build_index

    return load_or_build_index(
        find_shards([str(corpus / "train")]), processor, corpus / "index", Limits()
    )  # beside, not among, those of the runs


@pytest.fixture(scope="session")
def forge(cache_dir, corpus, tmp_path_factory):
    """Starts real training jobs fast; see `tests/reliability/jobs.py` and `forge.py`."""
    sys.path.insert(0, str(ROOT / "tests" / "reliability"))  # first: tests/slurm has a file of that name too
    from jobs import Forge

    with open(tmp_path_factory.mktemp("forge") / "log", "w") as log, Forge(cache_dir, log) as forge:
        yield forge


@pytest.fixture(scope="session")
def tiny_export(tiny_config, processor, tmp_path_factory):
    """Folder `tiny` of an exported model that has learned nothing, but answers with more than one token over and over."""
    from tokenflex.export import export_model
    from tokenflex.model import build_model

    torch.manual_seed(3)
    model = build_model(tiny_config.model, tiny_config.budget, processor, torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    folder = tmp_path_factory.mktemp("export") / "tiny"
    export_model(model, dict(model.state_dict()), processor, folder)
    return folder


@pytest.fixture(scope="session")
def thrifty_export(tiny_export, tmp_path_factory):
    """The same model under the same name, with a router that gives every image its smallest count, below the effort 1."""
    from tokenflex.export import export_router
    from tokenflex.infer import Generator
    from tokenflex.model.router import NUM_PRICES

    generator = Generator(tiny_export)
    model = generator.model
    counts = list(model.config.trained_num_visual_tokens)
    model.config.router = {"num_visual_tokens": counts, "hidden_size": 4, "turn_end_ids": [], "effort": 0.5}
    model.router = model.new_router()
    model.router.prices.copy_(model.router.prices.new_full((NUM_PRICES,), 1e6))
    folder = tmp_path_factory.mktemp("thrifty") / "tiny"
    export_router(model, generator.processor, tiny_export, folder)
    return folder


@pytest.fixture(scope="session")
def telling_export(thrifty_export, tmp_path_factory):
    """The same with weights so large that its answer differs with the image, the question and the count."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("telling") / "tiny"
    shutil.copytree(thrifty_export, folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.startswith("language_model.") and "_proj." in name:
            weight.mul_(16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class OneRank:
    """The part of `Ranks` that metrics use, where there is one rank."""

    rank, num_ranks = 0, 1

    def all_reduce_sum(self, values):
        return values.clone()

    def all_reduce_max(self, numbers):
        return list(numbers)


@pytest.fixture
def model(tiny_config, processor):
    from tokenflex.model import build_model

    torch.manual_seed(0)
    return build_model(tiny_config.model, tiny_config.budget, processor, torch.float32)


@dataclass
class Finished:
    """What a process left behind."""

    status: int
    output: str


def run_ranks(num_ranks, arguments, timeout_s=240, environment=None):
    """Run `python <arguments>` as ranks 0..n-1 of one job; returns how each ended.

    A rank that fails ends the others soon after (they would wait for it); a job that hangs fails the test.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes, logs = [], []
    for rank in range(num_ranks):
        variables = {**common, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, **(environment or {})}
        logs.append(tempfile.TemporaryFile(mode="w+"))  # noqa: SIM115  read after the rank has ended
        processes.append(
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env={**os.environ, **{name: str(value) for name, value in variables.items()}},
                cwd=ROOT,
                stdout=logs[-1],
                stderr=subprocess.STDOUT,
            )
        )
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.05)
        is_hung = [process.poll() is None for process in processes]
    finally:  # also when the test itself has run out of time
        for process in processes:
            process.kill()
            process.wait()
    finished = []
    for process, log in zip(processes, logs):
        log.seek(0)
        finished.append(Finished(process.returncode, log.read()))
    if all(is_hung):
        pytest.fail(f"{num_ranks} ranks hung for {timeout_s} s\n" + "\n".join(end.output[-2000:] for end in finished))
    return finished


def train_ranks(
    num_ranks, output_dir, cache_dir, *overrides, timeout_s=240, ds_config="configs/zero3.json", environment=None
):
    """A training run of the tiny recipe on real ranks; returns their outputs after checking that all succeeded."""
    arguments = ["launch/train.py", "--config", TINY, "--ds_config", ds_config]
    finished = run_ranks(
        num_ranks,
        [*arguments, f"output_dir={output_dir}", f"data.cache_dir={cache_dir}", *overrides],
        timeout_s,
        environment,
    )
    for rank, end in sorted(
        enumerate(finished), key=lambda item: item[1].status < 0
    ):  # the first to fail, not the killed
        assert end.status == 0, f"rank {rank} ended with {end.status}:\n{end.output[-4000:]}"
    return finished


def assert_kernels_pool_the_same(model, normalise, batch, shapes):
    """That a batch has the same loss through the kernels' plan of its tiles' `shapes` (counts or sides) as by plain torch."""
    from tokenflex.train.objective import Objective

    plain = Objective(model, normalise)(batch).total
    model.projector.backend = "kernels"
    planned = replace(batch, pool_plan=model.projector.plan_maker(model.patch_grid, torch.empty(0))(shapes))
    torch.testing.assert_close(Objective(model, normalise)(planned).total, plain, rtol=1e-5, atol=1e-6)
    model.projector.backend = "auto"
