"""What a person may get wrong at the entry points: one line on stderr, status 2, a traceback only with --debug."""

import importlib.util
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run_ranks
from PIL import Image

from tokenflex import cli
from tokenflex.cli.launching import entry_point
from tokenflex.config import load_config
from tokenflex.errors import UserError
from tokenflex.estimate.room import free_memory
from tokenflex.infer import parse_num_visual_tokens
from tokenflex.parallel import check_zero, load_ds_config


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_error_is_one_line_and_its_traceback_needs_debug(capsys):
    def fail(arguments, say):
        raise UserError("config x.yaml: unknown key a; did you mean b?")

    arguments = type("Arguments", (), {"debug": False})()
    assert entry_point(fail, arguments) == 2
    assert capsys.readouterr().err == "error: config x.yaml: unknown key a; did you mean b?\n"
    arguments.debug = True
    assert entry_point(fail, arguments) == 2
    assert "Traceback" in capsys.readouterr().err


def test_other_errors_are_not_hidden():
    def fail(arguments, say):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        entry_point(fail, type("Arguments", (), {"debug": False})())


def test_help_documents_every_key_and_the_aliases(capsys):
    with pytest.raises(SystemExit):
        load_script("train").parse(["--help"])
    text = capsys.readouterr().out
    for part in (
        "--ds_config",
        "--deepspeed_config",
        "--config",
        "--fresh",
        "train.num_steps=",
        "budget.probabilities=",
        "Peak learning rate",
    ):
        assert part in text


def test_what_a_person_and_a_launcher_type_is_understood():
    parse = load_script("train").parse
    arguments = parse(
        ["--local_rank=3", "train.num_steps=2", "--deepspeed_config", "x.json", "a.b=[1, 2]", "--config", "c.yaml"]
    )
    assert arguments.ds_config == "x.json" and arguments.config == "c.yaml"
    assert arguments.overrides == ["train.num_steps=2", "a.b=[1, 2]"]
    assert parse([]).config.endswith("quickstart.yaml") and parse([]).ds_config.endswith("zero3.json")


@pytest.mark.parametrize("text, part", [
    ("{", "not valid JSON"),
    (json.dumps({"gradient_accumulation_steps": 4}), "sets gradient_accumulation_steps; .* set data.packs_per_step instead"),
    (json.dumps({"optimizer": {"type": "Adam"}}), r"sets optimizer; .* set optimizer.\* instead"),
    (None, "No such file"),
])  # fmt: skip
def test_a_wrong_ds_config_is_named(tmp_path, text, part):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=part):
        load_ds_config(path)


def test_shipped_ds_configs_load():
    for path in (ROOT / "configs").glob("*.json"):
        assert load_ds_config(path)["zero_optimization"]["stage"] in (0, 1, 2, 3)


@pytest.mark.parametrize("zero, part", [
    ({"stage": 4}, "ZeRO has the stages 0 to 3"),
    ({"stage": 3, "mics_shard_size": 8}, "mics_shard_size: .*use zero_hpz_partition_size"),
    ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "device=nvme: what lies on NVMe is in no checkpoint; set it to cpu"),
    ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "would ignore it at stage 0; set stage 1, 2 or 3"),
    ({"stage": 2, "offload_param": {"device": "cpu"}}, "would ignore it at stage 2; set stage 3"),
    ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "ratio=0.5: .*nothing can veto"),
    ({"stage": 2, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size=2: needs stage 3, this is stage 2"),
    ({"stage": 3, "zero_hpz_partition_size": 3}, "=3: does not divide the 4 ranks; set it to the number of ranks on a node"),
])  # fmt: skip
def test_what_zero_cannot_do_here_is_refused_before_weights_load(zero, part):
    with pytest.raises(UserError, match=f"^--ds_config: zero_optimization.*{part}"):
        check_zero({"zero_optimization": zero}, num_ranks=4)


def test_free_memory_is_the_least_that_machine_and_group_leave(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    2000 kB\nSwapFree: 500 kB\n")
    assert free_memory(tmp_path) == 2500 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for name, text in {"max": "max\n", "current": "900000\n", "stat": "anon 7\ninactive_file 100000\n"}.items():
        (group / f"memory.{name}").write_text(text)
    assert free_memory(tmp_path) == 2500 * 1024
    (group / "memory.max").write_text("1000000\n")
    assert free_memory(tmp_path) == 200_000
    assert free_memory() > 1e6, "of this machine"


def test_sequence_parallelism_in_a_deepspeed_file_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"sequence_parallel_size": 4}))
    with pytest.raises(UserError, match="sets sequence_parallel_size; there is no sequence parallelism here"):
        load_ds_config(path)


def test_compiled_blocks_are_refused_at_stage_3():
    with pytest.raises(UserError, match="stage=3: gathers weights inside the blocks .*set stage 2, or compile off"):
        check_zero({"zero_optimization": {"stage": 3}}, 1, is_compiled=True)
    check_zero({"zero_optimization": {"stage": 2}}, 1, is_compiled=True)


def test_frozen_weights_in_8_bit_are_refused_at_stage_3():
    with pytest.raises(UserError, match="stage=3: .*wants whole rows: set stage 2, or same"):
        check_zero({"zero_optimization": {"stage": 3}}, 1, has_int8=True)
    check_zero({"zero_optimization": {"stage": 2}}, 1, has_int8=True)


@pytest.mark.parametrize("part", ["text", "vision"])
def test_8_bit_of_a_part_that_is_trained_whole_is_refused(part):
    ours = f"model.{part}_frozen_dtype=int8"
    with pytest.raises(UserError, match=f"{ours}, but the {part} part is trained whole.*; set it to same") as error:
        load_config(None, [ours])
    assert "\n" not in str(error.value)
    load_config(None, [ours, f"optimizer.{part}.train=false"])
    load_config(None, [ours, f"model.{part}_adapter.rank=2"])


def test_shipped_ds_configs_are_not_refused():
    for path in (ROOT / "configs").glob("*.json"):
        check_zero(load_ds_config(path), num_ranks=16)


WRONG_RUNS = {
    "unknown key": (["train.num_stps=3"], "did you mean train.num_steps"),
    "missing shard": (["data.train=/nowhere/*.tar"], "data.train: no shard at /nowhere/"),
    "too few packs for the ranks": (["data.packs_per_step=4", "data.lockstep_packs=4"], "does not divide over 3 ranks"),
    "sample longer than a pack": (["data.pack_length=24"], "set data.over_long=drop"),
    "tokenizer without image tokens": (['model.image_tokens=["<a>","<b>","<c>"]'], "lacks the image tokens"),
    "a typo inside a part": (["model.text.hiden_size=64"], "did you mean model.text.hidden_size?"),
    "an option that the template lacks": (
        ["model.chat_template_options.enable_thinking=false"],
        "does not know 'enable_thinking'",
    ),
    "a template that is not there": (["model.chat_template=short"], "neither a file nor a template of the tokenizer"),
    "validation without shards": (
        ["evaluate.every=2", "data.evaluation=[]"],
        "data.evaluation is empty; name held-out",
    ),
    "validation at a count that fits no pack": (
        ["evaluate.every=2", "evaluate.num_visual_tokens=[640]"],
        "fit no pack",
    ),
    "trained counts above the grid": (
        ["model.pooling_mode=resize", "budget.num_visual_tokens=[4,192]"],
        "budget.num_visual_tokens: 192 visual tokens are 12 x 16, the image has 6 x 8 patches",
    ),
    "validated counts above the grid": (
        ["model.pooling_mode=resize", "evaluate.every=2", "evaluate.num_visual_tokens=[4,49]"],
        "evaluate.num_visual_tokens: 49 visual tokens are 7 x 7",
    ),
    "all frozen": (
        ["optimizer.vision.train=false", "optimizer.text.train=false", "optimizer.projector.train=false"],
        "vision, projector and text are all frozen",
    ),
    "an adapter on a part that has no such layer": (
        ["model.text_adapter.rank=2", "model.text_adapter.layers=[nothing_proj]"],
        "model.text_adapter: Target modules",
    ),
    "an average without room": (
        ["train.ema_decay=0.9"],
        "GB are free; set train.ema_decay=0, without which it fits, or take more ranks",
    ),
    "a model without room": (
        ["model.text.hidden_size=16384", "model.text.intermediate_size=65536", "model.text.num_hidden_layers=40"],
        "GB are free; take more ranks, a higher ZeRO stage or smaller parts",
    ),
    "sequence parallelism": (["train.sequence_parallel_size=2"], "there is no sequence parallelism here"),
}


@pytest.mark.parametrize("case", WRONG_RUNS)
def test_a_wrong_run_ends_with_one_line(case, tmp_path, cache_dir, corpus, monkeypatch, capsys):
    """The real entry point, in this process; the two cases that need a job of their own are below."""
    overrides, part = WRONG_RUNS[case]
    if case == "an average without room":  # the tiny run holds 1.54 MB with it
        monkeypatch.setattr("tokenflex.estimate.room.free_memory", lambda: 1.4e6)
    train = load_script("train")
    if case == "too few packs for the ranks":
        for name, value in {"RANK": 0, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, str(value))
    else:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("MASTER_PORT", "29755")
    arguments = ["--config", str(TINY), f"data.cache_dir={cache_dir}", f"output_dir={tmp_path}", *overrides]
    assert entry_point(train.main, train.parse(arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and part in error, error
    assert not torch.distributed.is_initialized()
    assert not (tmp_path / "tiny" / "checkpoints").exists()


def test_an_error_is_said_once_by_many_ranks(tmp_path, cache_dir, corpus):
    ends = run_ranks(
        2,
        [
            "launch/train.py",
            "--config",
            TINY,
            f"data.cache_dir={cache_dir}",
            f"output_dir={tmp_path}",
            "data.pack_length=24",
        ],
    )
    assert [end.status for end in ends] == [2, 2]
    assert sum("error: " in end.output for end in ends) == 1
    assert not any("Traceback" in end.output for end in ends)


def test_a_port_that_another_job_has_taken_is_one_line(tmp_path, cache_dir, corpus):
    """And the run has not begun: the same command with another port is the first."""
    with socket.socket() as another:
        another.bind(("127.0.0.1", 0))
        another.listen()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(another.getsockname()[1])}
        arguments = ["--config", TINY, f"data.cache_dir={cache_dir}", f"output_dir={tmp_path}"]
        end = subprocess.run(
            [sys.executable, ROOT / "launch" / "train.py", *map(str, arguments)],
            env={**os.environ, **where, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    (line,) = (line for line in end.stderr.splitlines() if "error: " in line)
    assert end.returncode == 2 and "Traceback" not in end.stderr
    assert f"127.0.0.1:{where['MASTER_PORT']}" in line and "set MASTER_PORT" in line
    assert not (tmp_path / "tiny" / "checkpoints").exists()


@pytest.mark.parametrize(
    "text, counts", [("144", 144), ("8x12", (8, 12)), ("64,256", [64, 256]), ("4x4, 9", [(4, 4), 9])]
)
def test_counts_as_typed(text, counts):
    assert parse_num_visual_tokens(text) == counts


@pytest.mark.parametrize("text", ["0", "-4", "abc", "", "3x", "2x3x4", "64,,", "1.5", "0x4"])
def test_counts_that_are_none_are_named(text):
    with pytest.raises(UserError, match="--num-visual-tokens"):
        parse_num_visual_tokens(text)


def generate(model, *arguments):
    return cli.main(
        ["generate", "--model", str(model), "--prompt", "What is it?", "--max-new-tokens", "3", *map(str, arguments)]
    )


def test_generate_answers_at_any_counts(tiny_export, tmp_path, capsys):
    image = tmp_path / "a.jpg"
    Image.effect_noise((80, 50), 60).save(image)
    assert generate(tiny_export) == 0
    capsys.readouterr()
    answers = []
    for arguments in ([], ["--num-visual-tokens", 12], ["--num-visual-tokens", "3x4"]):
        assert generate(tiny_export, "--image", image, *arguments) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2]  # 12 is the largest trained count, shaped 3 x 4 like the grid
    assert generate(tiny_export, "--image", image, "--image", image, "--num-visual-tokens", "3x5,7") == 0


def test_generate_names_what_is_wrong(tiny_export, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    for arguments, part in (
        (["--image", tmp_path / "none.png"], "No such file"),
        (["--image", broken], "not a readable image"),
        (["--image", image, "--num-visual-tokens", "0"], "is no count"),
        (["--image", image, "--num-visual-tokens", "4,4"], "2 entries for 1 images"),
    ):
        assert generate(tiny_export, *arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: --") and part in error, error
    assert generate(tmp_path / "nowhere") == 2
    assert "no exported model there" in capsys.readouterr().err


def test_the_command_is_installed():
    end = subprocess.run([sys.executable, "-m", "tokenflex.cli", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert end.returncode == 0 and "generate" in end.stdout
