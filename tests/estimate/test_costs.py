"""An estimate is what is there: parameters, FLOPs and bytes of real runs, published sizes, and what a plan draws."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run_ranks
from measured_memory import BUCKET, ds_config_of
from recipes import QWEN2_5_7B, SO400M
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenflex import cli
from tokenflex.budget import VisualTokenBudget
from tokenflex.config import AdapterConfig, BudgetConfig, load_config
from tokenflex.data import batch_loader
from tokenflex.data.loader import micro_batches
from tokenflex.data.sources import Here, open_data
from tokenflex.errors import UserError
from tokenflex.estimate import AssumedSamples, describe, estimate, gpu_named, workload_of
from tokenflex.estimate.memory import ModelSizes, stage_memory
from tokenflex.estimate.trace import LiveBytes, PackShape, activation_bytes, logits_bytes, unit_costs
from tokenflex.estimate.workload import limit_pack, packs_of
from tokenflex.model import build_model
from tokenflex.model.build import recompute_activations, shaped_model
from tokenflex.parallel import load_ds_config
from tokenflex.plan import Mixture, Planner, Position, Source
from tokenflex.plan.table import LengthTable
from tokenflex.telemetry.flops import model_flops
from tokenflex.train.loss import cross_entropies, weighted_sum
from tokenflex.train.objective import Objective, model_inputs
from tokenflex.train.optimizer import parameter_groups

ZERO3 = load_ds_config(ROOT / "configs" / "zero3.json")
HUNDRED_MILLION = ROOT / "tests" / "estimate" / "hundred-million.yaml"


@pytest.fixture(scope="module")
def data(tiny_config, processor):
    return open_data(tiny_config, processor, Here(), say=lambda text: None)


@pytest.fixture(scope="module")
def batch(data):
    """The first micro-batch of the tiny recipe on one rank."""
    plans = micro_batches(data.planner.steps_from(Position()), 0, 1, 2)
    return next(batch_loader(data.dataset, iter([next(plans)]), 0, False))[1]


@pytest.fixture
def shaped(tiny_config):
    return shaped_model(tiny_config.model, tiny_config.budget, torch.float32)


def frozen(config, *parts):
    """The optimizer section with these parts frozen."""
    update = {part: getattr(config.optimizer, part).model_copy(update={"train": False}) for part in parts}
    return config.optimizer.model_copy(update=update)


@pytest.mark.parametrize("parts", [(), ("vision",), ("vision", "text"), ("text",), ("projector", "vision")])
def test_flops_are_those_of_torchs_counter(parts, tiny_config, model, batch, shaped, processor):
    """Forward and backward, for whatever is frozen. The counter sees all pairs of a sample, ours those that a token sees."""
    for which in (model, shaped):
        parameter_groups(which, frozen(tiny_config, *parts))
    objective = Objective(model, processor.image_processor.normalised)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = objective(batch).total
        forward = counter.get_total_flops()
        loss.backward()
    lengths = batch.cu_seq_lens.diff().double()
    work = {
        "tiles": len(batch.images),
        "visual_tokens": len(batch.visual_positions),
        "tokens": batch.input_ids.shape[1],
        "pairs": float(lengths.square().sum()),
        "learned_tokens": len(batch.targets),
    }
    ours = unit_costs(shaped).of(**work).values()
    assert sum(passes.forward for passes in ours) == pytest.approx(forward, rel=0.01)
    assert sum(passes.total for passes in ours) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("parts", [(), ("vision",), ("vision", "text")])
def test_a_run_logs_its_utilisation_by_the_same_flops(parts, tiny_config, shaped):
    """What telemetry states by formulas is what the trace counts."""
    parameter_groups(shaped, frozen(tiny_config, *parts))
    ours, theirs = unit_costs(shaped), model_flops(shaped)
    assert theirs.per_pair == pytest.approx(ours.pair.total, rel=0.01)
    passes = 1 if "vision" in parts else 3  # pixels need no gradient, which a formula of passes leaves out of account
    assert theirs.per_tile == pytest.approx(passes * ours.tile.forward, rel=0.01) and theirs.per_tile >= ours.tile.total
    assert theirs.per_token == pytest.approx(ours.token.total, rel=0.02)
    assert theirs.per_learned == pytest.approx(ours.learned_token.total, rel=0.02)


@pytest.mark.parametrize("parts", [(), ("vision",), ("vision", "text")])
@pytest.mark.parametrize("recomputes", [False, True])
def test_activations_are_those_of_a_real_pass(parts, recomputes, tiny_config, model, batch, shaped, processor):
    """Bytes alive at once in a forward and backward pass on the CPU, whose attention holds as much as flash attention does."""
    pack = PackShape(
        lengths=tuple(batch.cu_seq_lens.diff().tolist()),
        tiles=len(batch.images),
        count=len(batch.visual_positions) // len(batch.images),
        learned=len(batch.targets),
    )
    for which in (model, shaped):
        parameter_groups(which, frozen(tiny_config, *parts))
        which.train()
        for parameter in which.parameters():
            parameter.grad = None
        if recomputes:
            recompute_activations(which)
    hooks = [p.register_post_accumulate_grad_hook(_forget) for p in model.parameters() if p.requires_grad]
    known = [*model.parameters(), *model.buffers()]
    with LiveBytes(known) as live:
        _answer(model, batch, processor).sum().backward()
    for hook in hooks:
        hook.remove()
    assert activation_bytes(shaped, pack) == pytest.approx(live.peak, rel=0.1)


def _answer(model, batch, processor):
    inputs = {**model_inputs(batch, processor.image_processor.normalised), "logits_to_keep": torch.tensor([0])}
    return model(**inputs).logits


def _forget(parameter):
    parameter.grad = None


def test_a_frozen_encoder_that_recomputes_has_no_backward_pass(tiny_config, processor):
    recipe = tiny_config.model.model_copy(update={"gradient_checkpointing": True})
    model = build_model(recipe, tiny_config.budget, processor, torch.float32).train()
    parameter_groups(model, frozen(tiny_config, "vision"))
    pixels = torch.zeros(1, 3, 48, 64)
    assert not model.vision_tower(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state.requires_grad


def test_logits_of_a_real_loss(model):
    head = model.language_model.get_output_embeddings()
    width, num_learned = head.weight.shape[1], 200
    hidden = torch.zeros(num_learned, width, requires_grad=True)
    targets, weights = torch.zeros(num_learned, dtype=torch.long), torch.ones(num_learned)
    with LiveBytes([hidden, targets, weights, head.weight]) as live:
        weighted_sum(cross_entropies(head(hidden), targets), weights, 1.0).backward()
    assert logits_bytes(model.to("meta"), num_learned, is_fused=False) == pytest.approx(live.peak, rel=0.1)


def run_estimate(config, gpus=4, **options):
    return estimate(config, ZERO3, workload_of(config), num_gpus=gpus, gpu=gpu_named("h100"), **options)


def test_published_sizes(tiny_config):
    """Parameters that the makers' pages give, and the costs that `data.cost` has of the same models."""
    model = tiny_config.model.model_copy(update={"vision": SO400M, "text": QWEN2_5_7B, "image_size": (378, 378)})
    shaped = shaped_model(model, tiny_config.budget, torch.bfloat16)
    assert shaped.language_model.num_parameters() == 7_615_616_512
    assert shaped.vision_tower.num_parameters() == pytest.approx(412.4e6, rel=0.003)
    costs, cost = unit_costs(shaped), tiny_config.data.cost
    assert costs.pair.total == 2 * cost.per_token_pair, "a pair of the square is half of one that is seen"
    assert costs.token.total == pytest.approx(cost.per_token, rel=0.1)
    assert costs.tile.total == pytest.approx(cost.per_tile, rel=0.1)


def test_no_pack_of_a_plan_exceeds_the_worst(tiny_config, data):
    work = workload_of(tiny_config)
    assert "plan of" in work.source
    limit = limit_pack(tiny_config.data, data.planner.budget)
    totals = [packs_of(window, data.planner.budget) for _, window, _ in data.planner.windows(0)]
    for name, most, at_most in (
        ("tokens", work.worst.tokens, limit.tokens),
        ("tiles", work.worst.tiles, limit.tiles),
        ("learned_tokens", work.worst.learned, limit.learned),
    ):
        assert max(getattr(packs, name).max() for packs in totals) == most <= at_most, name
    step = next(data.planner.steps_from(Position()))
    counts = sum(len(pack.sample_ids) for pack in step.packs)
    assert work.step.samples == pytest.approx(counts, rel=0.5)


@pytest.mark.parametrize("kind", ["one", "all", "largest_and_one"])
def test_steps_hold_every_view_of_their_samples(kind, tiny_config):
    """Tokens, visual tokens, pairs, learned tokens of planned packs and of assumed samples, view by view."""
    budget = BudgetConfig(num_visual_tokens=(4, 12, 25), probabilities=(1, 1, 1), per_sample=kind)
    data = tiny_config.data.model_copy(update={"pack_length": 900})
    config = tiny_config.model_copy(update={"budget": budget, "data": data})
    rng = np.random.default_rng(0)
    table = LengthTable(
        text=rng.integers(10, 60, 2000),
        tiles=rng.integers(0, 4, 2000),
        learned=rng.integers(1, 9, 2000),
        name="made up",
    )
    drawn = VisualTokenBudget.of(budget)
    planner = Planner(Mixture([Source(index=table)]), drawn, data, config.train.seed, config.train.loss_weighting)
    _, window, _ = next(planner.windows(0))
    found = packs_of(window, drawn)
    for pack in range(0, window.num_packs, 7):
        wanted = np.zeros(4)
        for place in np.flatnonzero(window.pack == pack):
            sample = int(window.samples.id[place])
            text, tiles, learned = (int(column[sample]) for column in (table.text, table.tiles, table.learned))
            for view in drawn.views(int(window.samples.count[place])):
                length = text + tiles * view
                wanted += [length, tiles * view, length * (length + 1) / 2, learned]
        has = [getattr(found, name)[pack] for name in ("tokens", "visual_tokens", "pairs", "learned_tokens")]
        assert has == pytest.approx(wanted.tolist())
    assumed = workload_of(config, assumed=AssumedSamples(text_tokens=16, tiles=2)).step
    per_sample = np.mean([[16 + 2 * view for view in drawn.views(count)] for count in drawn.counts], axis=0)
    assert assumed.tokens / assumed.samples == pytest.approx(per_sample.sum())
    assert assumed.learned_tokens / assumed.samples == pytest.approx(8 * drawn.num_views)
    assert assumed.visual_tokens / assumed.samples == pytest.approx(per_sample.sum() - 16 * drawn.num_views)


def test_a_checkpoint_has_the_size_that_was_said(tiny_config):
    folder = ROOT / "tests" / "compatibility" / "0.1.0" / "run" / "checkpoints" / "step-00000004"
    config = load_config(ROOT / "tests" / "compatibility" / "0.1.0" / "recipe.yaml")
    model = config.model.model_copy(update={"tokenizer": str(ROOT / "tests/compatibility/0.1.0/model")})
    config = config.model_copy(update={"model": model})
    work = workload_of(config, assumed=AssumedSamples(text_tokens=16))
    found = estimate(config, ZERO3, work, num_gpus=1, gpu=gpu_named("h100"), precision="fp32")
    (path,) = folder.glob("*.safetensors")
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    num_tensors = 3 * len(json.loads((folder / "manifest.json").read_text())["parameters"])
    assert 0 <= path.stat().st_size - header - found.checkpoint_bytes < 256 * num_tensors, (
        "no more than gaps between tensors"
    )


def test_more_gpus_hold_less_and_take_less_time(tiny_config):
    few, many = (run_estimate(tiny_config, gpus) for gpus in (1, 4))
    assert few.step_flops == many.step_flops and few.step_s == pytest.approx(4 * many.step_s)
    for stage in (1, 2, 3):
        assert many.memory[stage].states < few.memory[stage].states
    states = [memory.states for memory in many.memory[:3]]  # at stage 3 small weights are whole and in slices
    assert states == sorted(states, reverse=True)
    assert many.memory[0].states == few.memory[0].states


def test_what_is_offloaded_leaves_the_gpu(shaped):
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    off = stage_memory(ModelSizes.of(shaped, {}), {"zero_optimization": zero}, 3, 2)
    on = stage_memory(ModelSizes.of(shaped, {}), {"zero_optimization": {"stage": 3}}, 3, 2)
    assert off.states == 0 and off.host == on.states + on.update


def test_an_adapter_and_an_average_are_in_the_estimate(tiny_config):
    """The adapter's weights alone are trained, in the model's format; the average takes 4 bytes of each, where the masters are."""
    model = tiny_config.model.model_copy(update={"text_adapter": AdapterConfig(rank=4)})
    train = tiny_config.train.model_copy(update={"ema_decay": 0.99})
    plain = run_estimate(tiny_config.model_copy(update={"model": model}))
    found = run_estimate(tiny_config.model_copy(update={"model": model, "train": train}))
    base = run_estimate(tiny_config)
    adapter = (
        2 * 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 48))
    )  # q, k and v, o, gate, up and down of two layers
    assert found.parts["text"].trained == adapter
    assert found.parts["text"].parameters == base.parts["text"].parameters + adapter
    assert found.export_bytes == base.export_bytes, "merged"
    trained = sum(part.trained for part in found.parts.values())
    assert [memory.average for memory in found.memory] == [4 * trained, *[trained] * 3], "over four ranks"
    assert all(memory.total == before.total + memory.average for memory, before in zip(found.memory, plain.memory))
    assert found.checkpoint_bytes == plain.checkpoint_bytes + 4 * trained
    off = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    shaped = shaped_model(model, tiny_config.budget, torch.bfloat16)
    parameter_groups(shaped, tiny_config.optimizer)
    sizes = ModelSizes.of(shaped, off)
    assert sizes.itemsize == 2 and {p.dtype for p in shaped.parameters()} == {torch.bfloat16}
    here, there = (stage_memory(sizes, off, 3, 4, with_average=has) for has in (False, True))
    assert there.states == here.states and there.host == here.host + trained


def check_memory(recipe, overrides, stages, precision="fp32"):
    """Real ranks at each stage hold what the estimate says, within 10 %, cause by cause."""
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "PYTHONWARNINGS": "ignore"}
    arguments = [ROOT / "tests" / "estimate" / "measured_memory.py", recipe, precision, ",".join(map(str, stages))]
    end = run_ranks(2, [*arguments, *overrides], timeout_s=900, environment=environment)[0]
    assert end.status == 0, end.output[-3000:]
    measured = [json.loads(line) for line in end.output.splitlines() if line.startswith("{")]
    assert [figures["stage"] for figures in measured] == list(stages)
    config = load_config(recipe, overrides)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = shaped_model(config.model, config.budget, dtype)
    parameter_groups(model, config.optimizer)
    slack = BUCKET * dtype.itemsize  # gradients that do not fit a bucket lie in one of their own until they are cut
    for figures in measured:
        ds_config = ds_config_of(figures["stage"])
        ours = stage_memory(ModelSizes.of(model, ds_config), ds_config, figures["stage"], 2)
        rest = ours.master + ours.gradients + ours.buffers
        said = {"weights": ours.weights, "moments": ours.moments, "masters_gradients_buffers": rest}
        for cause, value in said.items():
            assert value == pytest.approx(figures[cause], rel=0.1, abs=slack), (figures["stage"], cause, value, figures)
        states = figures["weights"] + figures["moments"] + figures["masters_gradients_buffers"]
        assert ours.states + ours.buffers == pytest.approx(states, rel=0.1), figures
        assert figures["gathered"] <= ours.gathered <= 1.25 * figures["gathered"], figures
    return measured


SMALL = [
    "model.vision.num_hidden_layers=1", "model.vision.intermediate_size=512", "model.text.hidden_size=320",
    "model.text.num_hidden_layers=2", "model.text.intermediate_size=640", "model.text.num_attention_heads=5",
    "model.text.num_key_value_heads=1", "model.text.vocab_size=4000",
]  # fmt: skip


def test_memory_is_what_two_ranks_hold():
    check_memory(HUNDRED_MILLION, SMALL, (0, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_of_a_hundred_million_parameters(precision):
    measured = check_memory(HUNDRED_MILLION, [], (0, 1, 2, 3), precision)
    path = ROOT / "docs" / "results" / "memory.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if os.environ.get("TOKENFLEX_REPORT"):
        path.write_text(json.dumps({**known, precision: measured}, indent=1) + "\n")


def test_the_command_prints_tables_and_json(tiny_config, cache_dir, capsys, tmp_path):
    command = ["estimate", "--config", str(TINY), "--set", f"data.cache_dir={cache_dir}", "--gpus", "2"]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    for word in ("vision", "ZeRO 3 *", "activations", "attention", "at 35 % MFU (assumed)", "plan of"):
        assert word in text, word
    assert cli.main([*command, "--json", "--mfu", "0.5"]) == 0
    values = json.loads(capsys.readouterr().out)
    found = run_estimate(tiny_config, 2)
    assert values["step_flops"] == found.step_flops and values["memory"][3]["total"] == found.memory[3].total
    assert values["step_s"] == pytest.approx(found.step_s * 0.35 / 0.5)
    assert describe(found).count("\n") > 25


@pytest.mark.parametrize("words, part", [
    (["--gpus", "3"], "does not divide over 3 ranks"),
    (["--gpu", "h900"], "--gpu h900: not in the table; wanted one of a100"),
    (["--text-tokens", "9000"], "a sample has 9004 tokens at 4 per tile, a pack holds 640"),
    (["--set", "model.text=nobody/nothing"], "model.text nobody/nothing: its config.json is neither in the cache nor to be had"),
    (["--set", "model.init_from=/nowhere"], "model.init_from: /nowhere is no folder here"),
    (["--lengths", "/nowhere.npz"], "--lengths /nowhere.npz: No such file"),
])  # fmt: skip
def test_what_cannot_be_estimated_is_named(words, part, cache_dir, capsys, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    command = ["estimate", "--config", str(TINY), "--set", f"data.cache_dir={cache_dir}", "--gpus", "2"]
    assert cli.main([*command, *words]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1, error


def mixture_of_experts(config, per_token=2):
    text = {
        "model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": per_token, "vocab_size": 600,
    }  # fmt: skip
    return config.model.model_copy(update={"text": text})


def test_of_experts_those_count_that_a_token_is_sent_to(tiny_config):
    costs = []
    for number in (1, 2):
        shaped = shaped_model(mixture_of_experts(tiny_config, number), tiny_config.budget, torch.bfloat16)
        costs.append(unit_costs(shaped).token)
    one_expert = 2 * 3 * 32 * 16
    assert costs[1].forward - costs[0].forward == one_expert and costs[1].total - costs[0].total == 3 * one_expert


def test_a_model_that_reads_values_is_refused_in_one_line(tiny_config, monkeypatch):
    """Experts that are gone through one by one, those alone that some token was sent to."""

    def one_by_one(*arguments):
        shaped = shaped_model(*arguments)
        shaped.set_experts_implementation("eager")
        return shaped

    monkeypatch.setattr("tokenflex.estimate.costs.shaped_model", one_by_one)
    config = tiny_config.model_copy(update={"model": mixture_of_experts(tiny_config)})
    with pytest.raises(UserError, match="cannot be run on shapes alone"):
        run_estimate(config, 2)


def test_parts_that_are_folders_need_no_more_than_their_configuration(tiny_config, tmp_path):
    for name, values in (("vision", SO400M), ("text", {**QWEN2_5_7B, "num_hidden_layers": 1})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    parts = {
        "vision": str(tmp_path / "vision"),
        "text": str(tmp_path / "text"),
        "tokenizer": "",
        "image_size": (378, 378),
    }
    model = tiny_config.model.model_copy(update=parts)
    config = tiny_config.model_copy(update={"model": model})
    found = estimate(
        config, ZERO3, workload_of(config, assumed=AssumedSamples(text_tokens=64)), num_gpus=4, gpu=gpu_named("h200")
    )
    assert any("tokenizer is not at hand" in note for note in found.notes)
    assert found.parts["vision"].parameters == pytest.approx(412.4e6, rel=0.003)
