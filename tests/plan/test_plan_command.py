"""`tokenflex plan`: figures by their definition, arrays that can be trusted, and one line for what cannot be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tokenflex import cli
from tokenflex.config import CostConfig
from tokenflex.plan.figures import Figures, totals
from tokenflex.plan.table import load_table

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "packing"))
from workload import workload  # noqa: E402


@pytest.fixture(scope="module")
def lengths(tmp_path_factory):
    text, tiles = workload(12_000, seed=1)
    path = tmp_path_factory.mktemp("lengths") / "lengths.npz"
    np.savez(path, text=text, tiles=tiles)
    return path


def plan(*arguments):
    return cli.main(["plan", *map(str, arguments)])


def reference(out, lengths, capacity, ranks):
    """Figures by their definition, pack by pack, in plain Python."""
    cost = CostConfig()
    packs = {}
    for sample, pack in zip(out["sample"].tolist(), out["pack"].tolist()):
        packs.setdefault(pack, []).append(sample)
    numbers = sorted(packs)
    assert numbers == list(range(len(numbers)))
    tokens, tiles, language = [], [], []
    for number in numbers:
        lengths_ = [int(lengths["text"][s] + lengths["tiles"][s] * out["count"][s]) for s in packs[number]]
        tokens.append(sum(lengths_))
        tiles.append(sum(int(lengths["tiles"][s]) for s in packs[number]))
        language.append(sum(cost.per_token * n + cost.per_token_pair * n * n for n in lengths_))
    steps = [range(i, i + ranks) for i in range(0, len(numbers) // ranks * ranks, ranks)]
    mean = sum(language[p] + tiles[p] * cost.per_tile for step in steps for p in step) / ranks
    slowest = sum(max(language[p] for p in step) + cost.per_tile * max(tiles[p] for p in step) for step in steps)
    return tokens, tiles, {"utilisation": sum(tokens) / capacity / len(numbers), "z3_waste": 1 - mean / slowest}


@pytest.mark.parametrize("shares", ["0.333333,0.333333,0.333333", "1,1,1"])
def test_shares_are_weights(shares, lengths, tmp_path):
    draws = []
    for name, given in (("given", shares), ("exact", f"{1 / 3!r},{1 / 3!r},{1 / 3!r}")):
        assert plan("--lengths", lengths, "--probabilities", given, "--out", tmp_path / f"{name}.npz") == 0
        draws.append(np.load(tmp_path / f"{name}.npz")["count"])
    np.testing.assert_array_equal(*draws)


@pytest.mark.parametrize("mixing", [[], ["--mixed-counts"]])
def test_the_figures_are_those_of_the_arrays_and_the_goals_are_met(mixing, lengths, tmp_path, capsys):
    out, figures = tmp_path / "packs.npz", tmp_path / "figures.json"
    assert plan("--lengths", lengths, "--ranks", 8, "--out", out, "--json", figures, *mixing) == 0
    said = capsys.readouterr().out
    arrays, table, result = dict(np.load(out)), dict(np.load(lengths)), json.loads(figures.read_text())
    np.testing.assert_array_equal(np.sort(arrays["sample"]), np.arange(12_000))
    assert (np.diff(arrays["pack"]) >= 0).all() and set(arrays["count"].tolist()) == {64, 144, 256}
    tokens, tiles, expected = reference(arrays, table, 8192, 8)
    assert max(tokens) <= 8192 and max(tiles) <= 48
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-9), name
    assert result["coverage_of_what_fits"] == 1
    assert result["utilisation"] >= (0.995 if mixing else 0.985)
    assert result["z3_waste"] <= 0.01 and result["effective"] >= 0.985 - (0 if mixing else 0.005)
    assert result["vision_waste"] <= 0.025
    for word in ("utilisation", "ZeRO-3", "coverage     100.00 %", "memory", "speed"):
        assert word in said


def test_one_count_runs_in_each_micro_step(lengths, tmp_path):
    out = tmp_path / "packs.npz"
    assert plan("--lengths", lengths, "--ranks", 16, "--out", out) == 0
    arrays, table = np.load(out), np.load(lengths)
    has_image = table["tiles"][arrays["sample"]] > 0
    step, count = arrays["pack"][has_image] // 16, arrays["count"][arrays["sample"]][has_image]
    distinct = [len(np.unique(count[step == number])) for number in range(step.max() + 1)]
    assert sum(number > 1 for number in distinct) <= 3 and len(distinct) > 80


def test_counts_come_as_often_as_asked_and_the_plan_repeats(lengths, tmp_path):
    for name in ("a", "b"):
        assert plan("--lengths", lengths, "--probabilities", "0.1,0.2,0.7", "--out", tmp_path / f"{name}.npz") == 0
    one, two = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    for name in ("sample", "pack", "count"):
        np.testing.assert_array_equal(one[name], two[name])
    shares = [(one["count"] == count).mean() for count in (64, 144, 256)]
    np.testing.assert_allclose(shares, (0.1, 0.2, 0.7), atol=0.02)


def test_what_is_too_long_is_left_out_counted_and_listed(tmp_path, capsys):
    text = np.full(400, 100)
    text[[7, 300]] = 9000
    tiles = np.zeros(400, int)
    tiles[20] = 60
    np.savez(tmp_path / "l.npz", text=text, tiles=tiles)
    assert plan("--lengths", tmp_path / "l.npz", "--ranks", 2, "--out", tmp_path / "o.npz") == 0
    np.testing.assert_array_equal(
        np.sort(np.load(tmp_path / "o.npz")["sample"]), np.delete(np.arange(400), [7, 20, 300])
    )
    said = capsys.readouterr().out
    assert "3 longer than a pack" in said and "100.00 % of what fits" in said and "300" in said
    assert plan("--lengths", tmp_path / "l.npz", "--ranks", 2, "--over-long", "error") == 2


@pytest.mark.parametrize("arguments, part", [
    (["--counts", "64,64", "--probabilities", "0.5,0.5"], "distinct counts"),
    (["--counts", "64,144", "--probabilities", "0.5,0.6"], "they must sum to 1, or be weights"),
    (["--counts", "64", "--probabilities", "0.5"], "wanted distinct counts and one probability per count"),
    (["--capacity", "200"], "a pack holds no image of 256"),
    (["--ranks", "20000"], "12000 samples per epoch cannot fill the 20000 packs"),
    (["--out", "/nowhere/x.npz"], "--out /nowhere/x.npz: No such file"),
])  # fmt: skip
def test_what_cannot_be_planned_is_one_line(arguments, part, lengths, capsys):
    assert plan("--lengths", lengths, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and part in error[0]


@pytest.mark.parametrize("arrays, part", [
    ({"text": [1, 2]}, "lacks tiles"),
    ({"text": [1.5], "tiles": [0]}, "text is float64"),
    ({"text": [1, 2], "tiles": [0]}, "as many of text as of tiles"),
    ({"text": [-1] * 20, "tiles": [0] * 20}, "negative lengths"),
])  # fmt: skip
def test_a_wrong_table_is_named(arrays, part, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", **{name: np.array(values) for name, values in arrays.items()})
    assert plan("--lengths", tmp_path / "x.npz") == 2
    assert part in capsys.readouterr().err
    (tmp_path / "y.npz").write_bytes(b"not a zip")
    assert plan("--lengths", tmp_path / "y.npz") == 2


def test_a_table_of_objects_is_not_unpickled(tmp_path, capsys):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", text=np.array([object()], dtype=object), tiles=np.zeros(1, int))
        assert plan("--lengths", tmp_path / "x.npz") == 2
        assert "not a readable .npz" in capsys.readouterr().err


def test_tables_are_mapped_and_compressed_ones_are_read(tmp_path):
    text, tiles = np.arange(1000), np.arange(1000) % 7
    np.savez(tmp_path / "a.npz", text=text, tiles=tiles)
    np.savez_compressed(tmp_path / "b.npz", text=text, tiles=tiles)
    for name, kind in (("a", np.memmap), ("b", np.ndarray)):
        table = load_table(tmp_path / f"{name}.npz")
        assert type(table.text) is kind
        np.testing.assert_array_equal(table.text, text)
        np.testing.assert_array_equal(table.tiles, tiles)


def test_an_index_can_be_planned_and_plots_are_drawn(index, corpus, tmp_path, capsys):
    arguments = ["--capacity", 640, "--max-tiles", 12, "--counts", "4,12", "--probabilities", "0.4,0.6", "--ranks", 2]
    assert plan("--index", corpus / "index", *arguments, "--plots", tmp_path / "plots") == 0
    assert f"{len(index)} samples" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"fill.png", "cost.png"}
    assert plan("--index", tmp_path) == 2


def test_an_empty_pack_is_no_pack_of_the_figures():
    figures = Figures(100, 2, CostConfig())
    figures.add(totals(np.array([0, 1, 2]), [100, 50, 100], [1, 1, 0], 4, CostConfig()))
    result = figures.result()
    assert result["packs"] == 3 and result["micro_steps"] == 1 and result["packs_without_image"] == 1
    assert result["utilisation"] == pytest.approx(250 / 300)


PLAN_ALONE = """
import resource, sys, time
begin = time.perf_counter()
from tokenflex import cli
assert cli.main(["plan", "--lengths", sys.argv[1], "--ranks", "64"]) == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_planning_needs_neither_torch_nor_much_memory(lengths):
    end = subprocess.run(
        [sys.executable, "-c", PLAN_ALONE, lengths], capture_output=True, text=True, env={**os.environ}, timeout=120
    )
    assert end.returncode == 0, end.stderr
    besides = float(end.stdout.split("the process has ")[1].split(" MB")[0])
    assert besides < 100
