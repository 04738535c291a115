"""Laws: a pack answers as its samples do one by one, and a packed, accumulated step has the gradient of the plain batch."""

import numpy as np
import pytest
import torch

from tokenflex.budget import VisualTokenBudget
from tokenflex.data import Limits, PackDataset
from tokenflex.data.collate import collate
from tokenflex.data.loader import MicroBatchPlan, micro_batches
from tokenflex.model.attention import PACKED
from tokenflex.plan import LOSS_WEIGHTS, Planner, Position
from tokenflex.train.objective import Objective, model_inputs

FAMILIES = {
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "llama": {"num_key_value_heads": 4},
    "mistral": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": None},
}


@pytest.fixture
def dataset(index, processor):
    return PackDataset(index, processor, "sqrt", blank_count=4, limits=Limits())


def mixed_ids(index, number=7):
    """Samples with no, one and two images."""
    groups = [np.flatnonzero(index.num_images == n)[: max(2, number // 3)] for n in (0, 1, 2)]
    return np.concatenate(groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_equal_unpacked_logits(family, tiny_config, processor, dataset, index):
    """With the real classes: the whole pack under packed attention against each sample alone under plain SDPA."""
    from tokenflex.model import build_model

    text = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        **FAMILIES[family],
    }
    section = tiny_config.model.model_copy(update={"text": {"model_type": family, **text}})
    torch.manual_seed(1)
    model = build_model(section, tiny_config.budget, processor, torch.float32).eval()
    ids = mixed_ids(index)
    counts = np.where(index.num_images[ids] > 0, np.resize([4, 12, 7], len(ids)), 0)
    pack = dataset.batch(MicroBatchPlan(Position(), True, ids, counts, 1.0))
    normalise = processor.image_processor.normalised
    with torch.no_grad():
        packed = model(**model_inputs(pack, normalise)).logits[0]
        assert model.language_model.config._attn_implementation == PACKED
        model.language_model.set_attn_implementation("sdpa")
        for place, (sample_id, count) in enumerate(zip(ids, counts)):
            sample = dataset.sample(sample_id)
            inputs = processor.apply_chat_template(
                sample.messages_with_images(), tokenize=True, num_visual_tokens=int(count) or None
            )
            alone = model(**inputs, use_cache=False).logits[0]
            begin, end = pack.cu_seq_lens[place : place + 2]
            torch.testing.assert_close(packed[begin:end], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("weighting", LOSS_WEIGHTS)
@pytest.mark.parametrize("split", [1, 2, 4])
def test_gradient_of_packed_accumulated_step_equals_unpacked_batch(
    weighting, split, tiny_config, model, processor, index
):
    """The step's packs cut into micro-batches in any way against every sample by itself, summed: fp32 within 1e-6."""
    dataset = PackDataset(index, processor, weighting, blank_count=4, limits=Limits())
    budget = VisualTokenBudget(counts=(4, 12), probabilities=(0.4, 0.6))
    planner = Planner(index, budget, tiny_config.data, seed=3, loss_weighting=weighting)
    step = next(planner.steps_from(Position()))
    normalise = processor.image_processor.normalised

    packed_loss = 0.0
    for plan in micro_batches([step], 0, 1, len(step.packs) // split):
        loss = Objective(model, normalise)(dataset.batch(plan)).total
        loss.backward()
        packed_loss += loss.item()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    ids = np.concatenate([pack.sample_ids for pack in step.packs])
    counts = np.concatenate([pack.counts for pack in step.packs])
    plain_loss = 0.0
    total = sum(
        float(index.learned_tokens[i] * LOSS_WEIGHTS[weighting](index.learned_tokens[i].astype(float))) for i in ids
    )
    for sample_id, count in zip(ids, counts):
        batch = collate(dataset.prepared(sample_id, int(count)), [sample_id], processor, weighting, total, 4)
        loss = Objective(model, normalise)(batch).total
        loss.backward()
        plain_loss += loss.item()
    assert abs(packed_loss - plain_loss) < 1e-6
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert packed.keys() == plain.keys()
    scale = max(grad.abs().max() for grad in plain.values())
    tolerance = float(1e-6 * max(scale, 1))
    for name in plain:
        worst = (packed[name] - plain[name]).abs().max().item()
        assert worst <= tolerance, f"{name}: {worst} > {tolerance}"


def test_empty_and_text_only_packs_give_zero_gradients_that_reach_the_vision_tower(model, dataset, processor, index):
    text_only = np.flatnonzero(index.num_images == 0)[:1]
    for ids in (np.empty(0, np.int64), text_only):
        model.zero_grad()
        batch = dataset.batch(MicroBatchPlan(Position(), True, ids, np.zeros(len(ids), np.int64), 2.0))
        assert batch.is_dummy_image and len(batch.visual_positions) == 0
        loss = Objective(model, processor.image_processor.normalised)(batch).total
        loss.backward()
        assert (loss.item() == 0.0) == (len(ids) == 0)
        tower = [p.grad for p in model.vision_tower.parameters() if p.grad is not None]
        assert tower and all((grad == 0).all() for grad in tower)


def test_packed_attention_refuses_what_it_would_get_wrong(model):
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(input_ids=torch.ones(2, 5, dtype=torch.long))
