"""What is frozen stays bit for bit, on two ranks at every ZeRO stage: weights, the rows beside the image tokens', and statistics."""

from conftest import run_ranks

SCRIPT = """
import torch
from tokenflex import parallel
from tokenflex.config import OptimizerConfig
from tokenflex.model import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.train.optimizer import make_optimizer, parameter_groups

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
VISION = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
PART, FROZEN, STEPS, RATE = {"train": True, "learning_rate": 1e-2}, {"train": False, "learning_rate": 1e-2}, 3, 1e-2
IMAGE = [3, 4, 5]
launch = parallel.join()
ranks = parallel.join_ranks(launch)


def tiny(is_tied):
    text = {"model_type": "llama", **SIZES, "tie_word_embeddings": is_tied, "attention_dropout": 0.2}
    config = TokenFlexConfig(
        VISION, text, image_height=32, image_width=32, trained_num_visual_tokens=(4,),
        image_start_token_id=3, image_token_id=4, image_end_token_id=5,
    )
    torch.manual_seed(0)
    return TokenFlexForConditionalGeneration(config)


def batch(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(6, 60, (1, 14), generator=generator)
    ids[0, 1:7] = torch.tensor([3, 4, 4, 4, 4, 5])
    images = torch.rand(1, 3, 32, 32, generator=generator) * 3
    return {"input_ids": ids, "pixel_values": images, "labels": ids.clone()}


def trained(model, settings, stage, dtype="fp32"):
    ds = {"zero_optimization": {"stage": stage}}
    if stage == 3:
        ds["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    groups = parameter_groups(model, settings)
    engine = parallel.Engine(model, make_optimizer(groups, settings), parallel.resolve_ds_config(ds, dtype, 1, 0.0), ranks)
    engine.train()
    for step in range(STEPS):
        inputs = batch(step, launch.rank)
        inputs["pixel_values"] = inputs["pixel_values"].to(engine.dtype)
        engine.backward(engine(**inputs).loss / launch.num_ranks)
        engine.step([RATE] * len(groups))
    state = engine.full_state()
    engine.close()
    return state


def alone(model, settings):
    # the same steps in plain torch on one rank
    groups = parameter_groups(model, settings)
    optimizer = torch.optim.AdamW([{**group, "lr": RATE} for group in groups], betas=settings.betas, eps=settings.eps)
    model.train()
    for step in range(STEPS):
        for rank in range(launch.num_ranks):
            (model(**batch(step, rank)).loss / launch.num_ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def check(before, after, rows):
    # frozen to the bit, but for these rows of embedding and output layer, which moved
    for name in before.keys() & after.keys():  # tied weights have one name there, and buffers that are never saved none here
        value = after[name]
        old = before[name].to(value.dtype)
        if "embed_tokens" in name or "lm_head" in name:
            others = torch.ones(len(value), dtype=torch.bool)
            others[rows] = False
            assert torch.equal(value[others], old[others]), name
            assert not rows or (value[[3, 5]] != old[[3, 5]]).any(-1).all(), name
        elif not name.startswith("projector"):
            assert torch.equal(value, old), name


frozen = {"vision": FROZEN, "projector": PART, "text": FROZEN}
for is_tied in (True, False):
    for rows in ([], IMAGE):
        settings = OptimizerConfig(**frozen, train_image_tokens=bool(rows))
        before = {name: value.clone() for name, value in tiny(is_tied).state_dict().items()}
        wanted = alone(tiny(is_tied), settings)
        check(before, wanted, rows)
        for stage in (0, 1, 2, 3) if rows else (3,):
            state = trained(tiny(is_tied), settings, stage)
            if launch.rank == 0:
                check(before, state, rows)
                for name in state.keys() & wanted.keys():
                    value = state[name]
                    torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=f"{name} at stage {stage}")
state = trained(tiny(False).to(torch.bfloat16), settings, 3, "bf16")
if launch.rank == 0:
    check({name: value.to(torch.bfloat16) for name, value in before.items()}, state, IMAGE)
moving = tiny(True)
trained(moving, OptimizerConfig(**{**frozen, "vision": PART}), 2)
name = "vision_tower.embedder.embedder.normalization.running_mean"
assert not torch.equal(dict(moving.named_buffers())[name], before[name]), "an encoder that is trained has statistics that move"
print("DONE", launch.rank)
torch.distributed.destroy_process_group()
"""


def test_what_is_frozen_stays_at_every_stage(tmp_path):
    script = tmp_path / "frozen.py"
    script.write_text(SCRIPT)
    for end in run_ranks(2, [script], 200):
        assert end.status == 0 and "DONE" in end.output, end.output[-3000:]
