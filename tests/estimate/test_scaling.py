"""The simulation keeps its books: phases are all of the time, more of anything never takes less, the plan is the run's own."""

import json

import numpy as np
import pytest
from conftest import ROOT, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex import cli
from tokenflex.errors import UserError
from tokenflex.estimate.network import NETWORKS, network_named
from tokenflex.estimate.scaling import (
    PHASES,
    Costs,
    Setting,
    Traffic,
    busy,
    describe,
    fitted,
    planned_packs,
    plot,
    scale_of,
    simulate,
)
from tokenflex.estimate.settings import load_costs
from tokenflex.estimate.trace import Passes, UnitCosts
from tokenflex.estimate.workload import Packs
from tokenflex.plan.table import LengthTable

COSTS = Costs(tile=3e-3, visual_token=1e-5, token=1e-4, pair=1e-8, learned_token=1e-5, micro_step=1e-3, step=2e-3)


def setting(stage=3, network="ib400", costs=COSTS, bytes_sent=1e9, num_workers=4):
    passes = Passes(forward=1e6, total=3e6)
    units = UnitCosts(tile=passes, visual_token=passes, token=passes, pair=passes, learned_token=passes)
    traffic = Traffic(per_micro_step=bytes_sent, per_step=0.0, collectives_per_micro_step=10, collectives_per_step=0)
    return Setting(
        costs=costs,
        units=units,
        traffic=traffic,
        network=NETWORKS[network],
        stage=stage,
        num_workers=num_workers,
        packs_per_micro_batch=1,
        flops=1e15,
    )


@pytest.fixture(scope="module")
def lengths():
    rng = np.random.default_rng(0)
    return LengthTable(text=rng.integers(10, 200, 3000), tiles=rng.integers(0, 4, 3000), name="made up")


@pytest.fixture(scope="module")
def config(tiny_config):
    data = tiny_config.data.model_copy(update={"packs_per_step": 8, "lockstep_packs": 4, "packs_per_micro_batch": 1})
    return tiny_config.model_copy(update={"data": data})


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_ranks_that_meet_more_often_wait_longer(steps, micro, ranks, random):
    """Stage 3 meets twice per micro-step, stage 2 once, below once per step; nobody takes less than the mean."""
    vision, language = (
        np.array([random.random() for _ in range(steps * micro * ranks)]).reshape(steps, micro, ranks) for _ in "vl"
    )
    often, sometimes, seldom = (busy(vision, language, stage) for stage in (3, 2, 1))
    mean = (vision + language).mean(axis=2).sum(axis=1)
    assert (often >= sometimes - 1e-9).all() and (sometimes >= seldom - 1e-9).all() and (seldom >= mean - 1e-9).all()
    if ranks == 1:
        np.testing.assert_allclose(often, mean)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("network", ["ib400", "eth100"])
def test_phases_are_all_of_a_step(stage, network, config, lengths):
    for scale in simulate(config, [lengths], setting(stage, network), [1, 2, 8, 16]):
        assert sum(scale.phases.values()) == pytest.approx(scale.step_s)
        assert min(scale.phases.values()) >= -1e-12 and set(scale.phases) == set(PHASES)
        assert 0.5 < scale.fill <= 1 and scale.mfu > 0


def test_one_rank_waits_for_nobody_and_sends_nothing(config, lengths):
    (alone,) = simulate(config, [lengths], setting(), [1])
    assert alone.phases["waiting"] == pytest.approx(0) and alone.phases["communication"] == 0
    packs = planned_packs(config, [lengths], 1)
    steps = len(packs.tokens) / 8
    wanted = (COSTS.vision(packs) + COSTS.language(packs)).sum() / steps + 8 * COSTS.micro_step + COSTS.step
    assert alone.step_s == pytest.approx(wanted)


def test_slower_networks_and_loaders_never_make_it_faster(config, lengths):
    packs = planned_packs(config, [lengths], 8)
    times = [scale_of(packs, config.data, setting(network=name), 8) for name in ("ib400", "ib100", "eth100")]
    assert times[0].step_s <= times[1].step_s <= times[2].step_s
    slow = scale_of(packs, config.data, setting(costs=Costs(**{**vars(COSTS), "decode": 1.0}), num_workers=1), 8)
    assert slow.phases["data"] > 0 and slow.step_s > times[0].step_s


def test_a_step_grows_where_ranks_do_not_divide_it(config, lengths):
    few, many = simulate(config, [lengths], setting(), [4, 16])
    assert (few.packs_per_step, many.packs_per_step) == (8, 16)
    assert many.tokens_per_s > few.tokens_per_s


@given(st.lists(st.floats(1e-6, 1e-2), min_size=5, max_size=5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_costs_are_found_again_from_the_times_they_make(costs, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(100, 1000, 30).astype(float)
    packs = Packs(
        tokens=tokens,
        tiles=rng.integers(0, 20, 30).astype(float),
        visual_tokens=np.zeros(30),
        pairs=tokens * rng.integers(5, 200, 30),
        learned_tokens=tokens * rng.random(30),
        samples=np.ones(30),
    )
    made = Costs(
        tile=costs[0],
        visual_token=0.0,
        token=costs[1],
        pair=costs[2] / 100,
        learned_token=costs[3],
        micro_step=costs[4],
    )
    seconds = made.vision(packs) + made.language(packs) + made.micro_step
    found = fitted(packs, seconds)
    again = found.vision(packs) + found.language(packs) + found.micro_step
    np.testing.assert_allclose(again, seconds, rtol=1e-4)


def test_no_cost_is_below_zero(config, lengths):
    packs = planned_packs(config, [lengths], 1)
    seconds = 1.0 / packs.tokens  # the fuller the faster: no such machine
    assert min(vars(fitted(packs, seconds)).values()) >= 0


def test_networks(tmp_path):
    network = NETWORKS["ib400"]
    assert network.seconds(1e9, 1) == 0
    inside, outside = network.seconds(1e9, 8), network.seconds(1e9, 64)
    assert inside < outside < network.seconds(1e9, 4096)
    path = tmp_path / "ours.yaml"
    path.write_text("{ranks_per_node: 4, intra_gb_s: 100, inter_gb_s: 10, latency_us: 3, overlap: 0.5}")
    assert network_named(str(path)).inter_gb_s == 10 and network_named("pcie").name == "pcie"


@pytest.mark.parametrize("text, part", [
    ("{ranks_per_node: 4, intra_gb_s: 100}", "lacks inter_gb_s, latency_us, overlap"),
    ("[1, 2]", "lacks ranks_per_node"),
    ("{ranks_per_node: 4, intra_gb_s: fast, inter_gb_s: 10, latency_us: 3, overlap: 0.5}", "intra_gb_s is 'fast'; wanted a number"),
    ("{ranks_per_node: 0, intra_gb_s: 1, inter_gb_s: 10, latency_us: 3, overlap: 0.5}", "ranks_per_node is 0"),
    ("{", "cannot be read"),
])  # fmt: skip
def test_a_network_that_lacks_something_is_named(tmp_path, text, part):
    path = tmp_path / "network.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        network_named(str(path))
    assert part in str(error.value) and "\n" not in str(error.value)


def test_the_command_writes_a_table_figures_and_a_plot(tmp_path, cache_dir, lengths, capsys):
    np.savez(tmp_path / "lengths.npz", text=lengths.text, tiles=lengths.tiles)
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"tile": 1e-3, "visual_token": 0, "token": 1e-5, "pair": 0, "learned_token": 0}))
    command = [
        "simulate",
        "--config",
        str(TINY),
        "--set",
        f"data.cache_dir={cache_dir}",
        "--lengths",
        str(tmp_path / "lengths.npz"),
    ]
    out, picture = tmp_path / "out.json", tmp_path / "plot.svg"
    words = [
        *command,
        "--ranks",
        "1,4,8",
        "--network",
        "eth100",
        "--costs",
        str(costs),
        "--json",
        str(out),
        "--plot",
        str(picture),
    ]
    assert cli.main(words) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "a cost model over the real plan, no step was run" in text and len(text.splitlines()) == 5
    assert [row["num_ranks"] for row in json.loads(out.read_text())] == [1, 4, 8]
    assert picture.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize("words, part", [
    (["--ranks", "0,8"], "--ranks 0,8: wanted whole numbers above 0"),
    (["--network", "carrier-pigeon"], "--network carrier-pigeon: neither in the table (ib400"),
    (["--costs", "/nowhere.json"], "--costs /nowhere.json: cannot be read"),
    (["--gpu", "h900"], "--gpu h900"),
    (["--set", "data.train=/nowhere"], "the recipe's shards have no index here"),
])  # fmt: skip
def test_what_cannot_be_simulated_is_named(words, part, cache_dir, capsys):
    command = ["simulate", "--config", str(TINY), "--set", f"data.cache_dir={cache_dir}", *words]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1, error


def test_costs_that_are_not_known_are_named(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"tile": 1, "tokens": 2}))
    with pytest.raises(UserError, match="learned_token, pair, token, tokens, visual_token missing or not known"):
        load_costs(path)


def test_a_plot_that_cannot_be_written_is_named(config, lengths, tmp_path):
    scales = simulate(config, [lengths], setting(), [1])
    assert "simulate" in describe(scales, setting(), "tiny")
    with pytest.raises(UserError, match="wanted a file ending in .svg or .png"):
        plot(scales, tmp_path / "plot.nothing", "tiny")


def test_the_committed_runs_agree_with_what_the_page_says():
    """Of docs/results/scaling.json: what was not in the calibration is predicted within 10 %, and the page has every row."""
    rows = json.loads((ROOT / "docs" / "results" / "scaling.json").read_text())["rows"]
    predicted = [row for row in rows if not row["is_calibration"]]
    assert {row["ranks"] for row in predicted} == {1, 2, 4}
    assert max(abs(row[name]) for row in predicted for name in ("error", "all_ranks_error")) < 0.1
    page = (ROOT / "docs" / "scaling.md").read_text()
    for row in rows:
        assert f"{row['cpu_ms']:.1f} / {row['predicted_cpu_ms']:.1f}" in page, row
