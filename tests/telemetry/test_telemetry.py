"""Laws of the figures per count and phase, and of what writes them down."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OneRank

from tokenflex.config import load_config
from tokenflex.data import Limits, PackDataset
from tokenflex.data.loader import MicroBatchPlan
from tokenflex.errors import UserError
from tokenflex.parallel.stopwatch import Stopwatch
from tokenflex.plan import Position
from tokenflex.telemetry import sinks
from tokenflex.telemetry.flops import ModelFlops
from tokenflex.train.metric_log import MetricLog
from tokenflex.train.metrics import Metrics
from tokenflex.train.objective import Objective
from tokenflex.train.telemetry import Telemetry

FLOPS = ModelFlops(per_tile=1000.0, per_visual_token=10.0, per_token=7.0, per_pair=0.5, per_learned=3.0)
CPU = torch.device("cpu")


def figures(model, batches, normalise, problems=("",)):
    """What telemetry adds for steps of these micro-batches, one step after the other."""
    metrics = Metrics()
    engine = SimpleNamespace(device=CPU, stopwatch=Stopwatch(CPU))
    heartbeat = SimpleNamespace(seconds={"fetch": 1.0})
    telemetry = Telemetry(metrics, [12, 4], 640, FLOPS, engine, heartbeat)
    objective = Objective(model, normalise)
    for problem in problems:
        for batch in batches:
            telemetry.on_batch(0, batch)
            telemetry.on_loss(batch, objective(batch))
        heartbeat.seconds = {"fetch": heartbeat.seconds["fetch"] + 2.0, "probe": 0.25}
        telemetry.on_step(SimpleNamespace(problem=problem))
    return metrics.read(OneRank())


@pytest.fixture(scope="module")
def packs(index, processor):
    """Samples at two counts and without images, as one micro-batch and as two."""
    dataset = PackDataset(index, processor, "sqrt", 4, Limits())
    ids = np.concatenate([np.flatnonzero(index.num_images > 0)[:6], np.flatnonzero(index.num_images == 0)[:1]])
    counts = np.array([4, 12, 12, 4, 12, 4, 0])
    whole = dataset.batch(MicroBatchPlan(Position(), True, ids, counts, 5.0))
    halves = [
        dataset.batch(MicroBatchPlan(Position(), True, ids[at], counts[at], 5.0)) for at in (slice(3), slice(3, 7))
    ]
    return whole, halves


def test_figures_per_count_sum_to_the_whole_however_a_step_is_cut(model, packs, processor):
    whole, halves = packs
    normalise = processor.image_processor.normalised
    one, two = figures(model, [whole], normalise), figures(model, halves, normalise)
    assert list(one["tokens_per_count"]) == ["text", "4", "12"]
    assert (
        sum(one["tokens_per_count"].values()) == whole.input_ids.shape[1] and min(one["tokens_per_count"].values()) > 0
    )
    counts, losses = whole.counts[whole.learned_views], Objective(model, normalise)(whole).token_losses
    for name, count in (("text", 0), ("4", 4), ("12", 12)):
        chosen = counts == count
        mean = (losses * whole.weights)[chosen].sum() / whole.weights[chosen].sum()
        assert one["loss_per_count"][name] == pytest.approx(float(mean), rel=1e-5)
        assert two["loss_per_count"][name] == pytest.approx(one["loss_per_count"][name], rel=1e-5)
    assert two["tokens_per_count"] == one["tokens_per_count"] and two["flops"] == one["flops"]
    assert one["fill"] == whole.input_ids.shape[1] / 640 and two["fill"] == one["fill"] / 2


def test_a_skipped_step_has_no_losses_and_its_seconds_count(model, packs, processor):
    normalise = processor.image_processor.normalised
    one, both = figures(model, packs[1], normalise), figures(model, packs[1], normalise, ["", "loss is nan"])
    assert both["loss_per_count"] == one["loss_per_count"]
    assert figures(model, packs[1], normalise, ["loss is nan"])["loss_per_count"] == dict.fromkeys(["text", "4", "12"])
    seconds = both["seconds_per_step"]
    assert seconds["data_wait"] == 2.0 and seconds["other"] == 0.125 and sum(seconds.values()) == 2.125
    assert both["work_s"] == {"mean": 2.0, "max": 2.0, "rank": 0}


def test_learned_tokens_know_their_sample(packs):
    whole, _ = packs
    begins = whole.cu_seq_lens.tolist()
    for place, sample in zip(whole.logits_positions.tolist(), whole.learned_views.tolist()):
        assert begins[sample] <= place < begins[sample + 1]
        assert place + 1 < begins[sample + 1], "the token that is predicted there is of the same sample"


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self):
        self.records = []

    def write(self, record, section=""):
        self.records.append(record)

    def rewind(self, step):
        self.records = [record for record in self.records if record["step"] <= step]

    def close(self):
        self.records.append("closed")


def test_rates_leave_out_what_validation_took_and_utilisation_needs_a_known_peak(monkeypatch):
    kept, clock = Kept(), iter([100.0, 110.0, 120.0, 130.0])
    monkeypatch.setattr("tokenflex.train.metric_log.time.perf_counter", lambda: next(clock))
    log = MetricLog([kept], num_steps=8, first_step=0, peak=1000.0)
    record = {"num_tokens": 600, "flops": 3000.0, "loss": 1.0, "images_per_count": {"4": 1}}
    log.on_log({**record, "step": 2, "seconds_per_step": {"validate": 2.0}})
    log.on_log({**record, "step": 4, "seconds_per_step": {"validate": 0.0}})
    log.close()
    first, second, closed = kept.records
    assert (first["seconds"], first["tokens_per_s"], first["flops_per_s"], first["mfu"]) == (10.0, 100.0, 500.0, 0.5)
    assert (second["tokens_per_s"], second["mfu"]) == (60.0, 0.3) and closed == "closed"
    unknown = MetricLog([Kept()], num_steps=8, first_step=0)._rates({**record, "step": 1}, 10.0)
    assert "mfu" not in unknown and unknown["flops_per_s"] == 300.0


def test_lines_of_steps_that_are_done_again_and_lines_cut_off_are_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = sinks.JsonLines(path, 0, "validation")
    for step in (2, 4, 6):
        lines.write({"step": step}, "validation")
        lines.write({"step": step}, "")  # another section's
    path.write_bytes(path.read_bytes() + b'{"step": 7, "lo')
    sinks.JsonLines(path, 4, "validation")
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]


def test_tensorboard_has_scalars_and_the_count_histogram_and_forgets_steps_done_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = sinks.TensorBoard(tmp_path, 0)
    for step, loss in ((2, 1.0), (4, 2.0)):
        board.write({"step": step, "loss": loss, "loss_per_count": {"4": loss}, "images_per_count": {"4": 3, "12": 1}})
    board.write({"step": 4, "loss": 9.0}, "validation")
    board.rewind(2)
    board.write({"step": 4, "loss": 3.0})
    board.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert {"loss", "loss_per_count/4", "validation/loss"} <= set(found.Tags()["scalars"])
    assert "step" not in found.Tags()["scalars"]
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(2, 1.0), (4, 3.0)]


def test_tensorboard_without_its_package_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    settings = load_config(None, ["train.tensorboard=true"]).train
    with pytest.raises(UserError, match="pip install 'tokenflex\\[tensorboard\\]'"):
        sinks.check_sinks(settings)
    sinks.check_sinks(load_config(None, []).train)
