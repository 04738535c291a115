"""The lines of docs/training.md for SLURM lead from two folders of weights through three stages to a model, on two nodes."""

import pytest
from slurm.jobs import Submitted
from stages import STAGES, check, commands_of_the_page, localised, save_parts, small


@pytest.mark.slurm
@pytest.mark.timeout(1800)
def test_the_pages_lines_lead_to_a_model_under_slurm(cluster, site, tmp_path, cache_dir, corpus):
    save_parts(tmp_path, corpus)
    for stage, (script, *arguments) in zip(STAGES, commands_of_the_page("sbatch"), strict=True):
        job = Submitted(cluster, site, tmp_path, cache_dir, script.removeprefix("slurm/").removesuffix(".sh"))
        job.arguments = localised(arguments, tmp_path, corpus)
        job.submit(*small(stage, tmp_path / "runs", cache_dir), options=["--nodes=2"])
        assert job.wait_for_end() == "COMPLETED", job.output()
    check(tmp_path, tmp_path / "runs")
