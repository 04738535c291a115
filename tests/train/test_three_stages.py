"""The lines of docs/training.md lead from two folders of weights through three stages to a model."""

import pytest
from conftest import run_ranks
from stages import STAGES, check, commands_of_the_page, localised, save_parts, small

from tokenflex import cli


def test_the_pages_lines_lead_to_a_model(tmp_path, cache_dir, corpus, capsys):
    save_parts(tmp_path, corpus)
    (estimate,) = commands_of_the_page("tokenflex")
    parts = [argument for key in small("pretrain", tmp_path, cache_dir) for argument in ("--set", key)]
    assert cli.main([*localised(estimate, tmp_path, corpus), *parts, "--set", "data.packs_per_step=8"]) == 0
    assert "GB per GPU" in capsys.readouterr().out
    commands = commands_of_the_page("deepspeed")
    assert [command[2] for command in commands] == [f"configs/{stage}.yaml" for stage in STAGES]
    for stage, command in zip(STAGES, commands):
        (end,) = run_ranks(1, [*localised(command, tmp_path, corpus), *small(stage, tmp_path / "runs", cache_dir)])
        assert end.status == 0, end.output[-3000:]
    check(tmp_path, tmp_path / "runs")


@pytest.mark.parametrize("program, number", [("tokenflex", 1), ("deepspeed", 3), ("sbatch", 3)])
def test_the_page_has_the_lines(program, number):
    assert len(commands_of_the_page(program)) == number
