"""The benchmark of inference: real generation timed, cases in turn, faults named."""

import itertools
import json

import pytest
import torch
from conftest import ROOT
from PIL import Image

from tokenflex.cli.main import main
from tokenflex.infer import bench


@pytest.mark.parametrize("cache, caches", [("dynamic", ["dynamic"]), ("both", ["dynamic", "static"])])
def test_every_case_is_timed_on_prompts_of_its_length(cache, caches, tiny_export, tmp_path, capsys):
    arguments = [
        "bench",
        str(tiny_export),
        "--batch-sizes",
        "1,3",
        "--new-tokens",
        "3",
        "--rounds",
        "2",
        "--cache",
        cache,
        "--out",
        str(tmp_path),
    ]
    with torch.compiler.set_stance("force_eager"):  # compiling takes a minute, and is tried in tests/model
        assert main(arguments) == 0
    cases = [bench.Case(**case) for case in json.loads((tmp_path / "bench.json").read_text())["cases"]]
    wanted = list(itertools.product((4, 12), (1, 3), caches))
    assert [(case.num_visual_tokens, case.batch_size, case.cache) for case in cases] == wanted
    assert {case.prompt_tokens - case.num_visual_tokens for case in cases} == {cases[0].prompt_tokens - 4}
    for case in cases:
        assert min(case.encode_s, case.first_token_s, case.from_features_s, case.tokens_per_s, case.memory_gb) > 0
    out = capsys.readouterr().out
    assert out.count("| 12 |") == 2 * len(caches) and "round 2 of 2" in out
    with Image.open(tmp_path / "bench.png") as image:
        assert image.size == (960, 432)


def test_medians_are_of_the_rounds_after_the_warm_up(tiny_export, monkeypatch):
    """The first round is slow and does not count; of 1, 5 and 3 the median is 3."""
    seconds = iter([100.0, 1.0, 5.0, 3.0])
    monkeypatch.setattr(bench, "_measure", lambda *_: (next(seconds),) * 4)
    (case,) = bench.bench(tiny_export, bench.Workload(counts=[4], batch_sizes=[1], rounds=3), say=lambda text: None)
    assert case.encode_s == case.tokens_per_s == 3.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--new-tokens", "1"], "wanted 2 or more tokens"),
        (["--counts", "0"], "argument --counts: invalid"),
        (["--counts", "4,100000000"], "error: --counts: a prompt of 100000031 tokens, images included"),
    ],
)
def test_workloads_that_cannot_be_timed_are_refused(tiny_export, arguments, message, capsys):
    try:
        assert main(["bench", str(tiny_export), *arguments]) == 2
    except SystemExit as end:
        assert end.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_is_named(tmp_path, capsys):
    assert main(["bench", str(tmp_path)]) == 2
    assert "no exported model there; give the folder that training wrote" in capsys.readouterr().err


def test_the_pages_table_is_its_records():
    record = ROOT / "docs/results/caches/bench.json"
    cases = [bench.Case(**case) for case in json.loads(record.read_text())["cases"]] if record.exists() else []
    table = bench.table(cases) if cases else "Not measured."
    marks = "<!-- begin: tokenflex bench --cache both -->", "<!-- end -->"
    assert f"{marks[0]}\n{table}\n{marks[1]}" in (ROOT / "docs/serving.md").read_text()
