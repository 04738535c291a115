"""The probe under real ZeRO engines on one and two ranks: it passes and refuses as it does bare, and moves nothing."""

import pytest
from conftest import run_ranks

PROBED = """
import torch
from tokenflex import parallel
from tokenflex.config import OptimizerConfig
from tokenflex.errors import UserError
from tokenflex.model import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.model.attention import PACKED, packing, register_packed_attention
from tokenflex.model.probe import probe
from tokenflex.train.optimizer import make_optimizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 300}
VISION = {"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 48, "patch_size": 8}
launch = parallel.join()
parallel.quiet_libraries()
ranks = parallel.join_ranks(launch)
device = ranks.device
register_packed_attention()


def engine_of(stage, text):
    config = TokenFlexConfig(VISION, {**SIZES, **text}, image_height=48, image_width=64, trained_num_visual_tokens=(4, 12))
    torch.manual_seed(0)
    model = TokenFlexForConditionalGeneration(config).train()
    model.language_model.set_attn_implementation(PACKED)
    settings = parallel.resolve_ds_config({"zero_optimization": {"stage": stage}}, "fp32", 1, 1.0)
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    groups = [{"params": list(model.parameters()), "lr": 1e-2}]
    engine = parallel.Engine(model, make_optimizer(groups, OptimizerConfig()), settings, ranks)
    engine.train()
    return engine


def trained(stage, is_probed):
    engine = engine_of(stage, {"model_type": "mistral", "sliding_window": 8, "attention_dropout": 0.1})
    if is_probed:
        random, training = torch.get_rng_state(), [m.training for m in engine.model.modules()]
        probe(engine.model, engine, device, pack_length=256)
        assert torch.equal(random, torch.get_rng_state()) and training == [m.training for m in engine.model.modules()]
        assert all(p.grad is None for p in engine.model.parameters())
        assert engine.model.language_model.config._attn_implementation == PACKED
    losses, generator = [], torch.Generator().manual_seed(5 + launch.rank)
    for _ in range(3):
        ids = torch.randint(3, 300, (1, 24), generator=generator)
        images = torch.rand(1, 3, 48, 64, generator=generator)
        cuts = torch.tensor([0, 10, 24], dtype=torch.int32)
        positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
        logits = engine(
            input_ids=ids, position_ids=positions, pixel_values=images, num_visual_tokens=[4],
            visual_positions=torch.arange(2, 6), **packing(cuts, 14, 24),
        ).logits
        loss = logits.logsumexp(-1).mean() / launch.num_ranks
        engine.backward(loss)
        engine.step([1e-2])
        losses.append(float(loss))
    state = engine.full_state()
    engine.close()
    return losses, state


for stage in (0, 2, 3):
    (plain, before), (probed, after) = trained(stage, False), trained(stage, True)
    assert plain == probed, (stage, plain, probed)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before), stage
    engine = engine_of(stage, {"model_type": "jamba", "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4})
    try:
        probe(engine.model, engine, device, pack_length=256)
    except UserError as error:
        print("REFUSED", launch.rank, stage, error)
    engine.close()
print("DONE", launch.rank)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_probe_moves_nothing_and_refuses_the_same_under_every_stage(num_ranks, tmp_path):
    script = tmp_path / "probed.py"
    script.write_text(PROBED)
    for rank, end in enumerate(run_ranks(num_ranks, [script])):
        assert end.status == 0 and f"DONE {rank}" in end.output, end.output[-3000:]
        for stage in (0, 2, 3):
            assert f"REFUSED {rank} {stage} model.text jamba: samples of a pack reach each other" in end.output, (
                end.output
            )
