"""The loader: packed tensors that say exactly what the samples say, in an order that workers do not change."""

import numpy as np
import pytest
import torch

from tokenflex.budget import VisualTokenBudget
from tokenflex.data import Limits, PackDataset, batch_loader
from tokenflex.data.loader import MicroBatchPlan, micro_batches
from tokenflex.errors import UserError
from tokenflex.plan import Planner, Position


@pytest.fixture
def dataset(index, processor):
    return PackDataset(index, processor, "sqrt", blank_count=4, limits=Limits())


def test_a_batch_says_what_its_samples_say(dataset, index, processor):
    ids = np.array([*np.flatnonzero(index.num_images == 2)[:2], *np.flatnonzero(index.num_images == 0)[:1], 3])
    counts = np.where(index.num_images[ids] > 0, [12, 4, 0, 12], 0)
    batch = dataset.batch(MicroBatchPlan(Position(), True, ids, counts, 5.0))
    token = processor.image_token_id
    assert batch.cu_seq_lens[-1] == batch.input_ids.shape[1] and batch.max_length == batch.cu_seq_lens.diff().max()
    assert torch.equal((batch.input_ids[0] == token).nonzero().squeeze(1), batch.visual_positions)
    assert batch.images.shape == (int(index.num_images[ids].sum()), 48, 64, 3)
    assert sum(batch.tile_counts) == len(batch.visual_positions)
    begins = batch.cu_seq_lens[:-1].long()
    assert (batch.position_ids[0, begins] == 0).all()
    text = processor.tokenizer.decode(batch.targets)
    for sample_id in ids:
        for message in dataset.sample(sample_id).messages:
            if message["role"] == "assistant":
                assert message["content"][0]["text"] + "<|im_end|>" in text
    for begin, end, sample_id in zip(batch.cu_seq_lens, batch.cu_seq_lens[1:], ids):
        inside = (batch.logits_positions >= begin) & (batch.logits_positions < end)
        weights = batch.weights[inside]
        assert len(weights) == index.learned_tokens[sample_id]
        torch.testing.assert_close(weights, torch.full_like(weights, len(weights) ** -0.5))


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_every_world_reads_one_order(num_ranks, num_workers, index, processor, tiny_config):
    """The global order of samples, read back from the batches themselves, for any ranks and workers."""
    data = tiny_config.data.model_copy(update={"packs_per_step": 8, "lockstep_packs": 8})
    planner = Planner(index, VisualTokenBudget(counts=(4, 12), probabilities=(0.5, 0.5)), data, 0, "sqrt")
    steps = [step for _, step in zip(range(2), planner.steps_from(Position()))]
    expected = np.concatenate([pack.sample_ids for step in steps for pack in step.packs])
    share = 8 // num_ranks
    by_place = {}
    for rank in range(num_ranks):
        dataset = PackDataset(index, processor, "sqrt", blank_count=4, limits=Limits())
        plans = micro_batches(steps, rank, num_ranks, 1)
        for number, (_, batch) in enumerate(batch_loader(dataset, plans, num_workers, pin_memory=False)):
            by_place[number // share, number % share, rank] = batch.sample_ids.numpy()
    np.testing.assert_array_equal(np.concatenate([by_place[place] for place in sorted(by_place)]), expected)


def test_order_and_content_do_not_depend_on_workers(dataset, index, tiny_config):
    budget = VisualTokenBudget(counts=(4, 12), probabilities=(0.5, 0.5))
    planner = Planner(index, budget, tiny_config.data, 0, "sqrt")

    def batches(num_workers):
        steps = planner.steps_from(Position())
        plans = (plan for _, plan in zip(range(6), micro_batches(steps, 0, 2, 1)))
        return list(batch_loader(dataset, plans, num_workers, pin_memory=False))

    for (plan, batch), (other_plan, other) in zip(batches(0), batches(3), strict=True):
        np.testing.assert_array_equal(plan.sample_ids, other_plan.sample_ids)
        for name in ("input_ids", "images", "targets", "weights", "visual_positions"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_is_the_same_one_line(index, processor, num_workers):
    shard = index.shards[0].path
    shard.rename(shard.with_suffix(".gone"))
    try:
        plans = [MicroBatchPlan(Position(), True, np.array([0]), np.array([4]), 1.0)]
        with pytest.raises(UserError, match="restore it or index again") as error:
            list(batch_loader(PackDataset(index, processor, "sqrt", 4, Limits()), plans, num_workers, False))
        assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    finally:
        shard.with_suffix(".gone").rename(shard)
