"""Model FLOPs against torch's own counter over real forward and backward passes, whatever is trained."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenflex.data import Limits, PackDataset
from tokenflex.data.loader import MicroBatchPlan
from tokenflex.plan import Position
from tokenflex.telemetry.flops import model_flops, num_pairs
from tokenflex.telemetry.peaks import peak_flops
from tokenflex.train.objective import Objective

PARTS = {"vision": "vision_tower", "projector": "projector", "text": "language_model"}


def counted(model, batch, normalise):
    """FLOPs of a step by torch; attention as plain products, which are all that it counts on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Objective(model, normalise)(batch).total.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trained", [("vision", "projector", "text"), ("projector",), ("projector", "text")])
def test_flops_are_what_torch_counts(trained, model, index, processor):
    for name, part in PARTS.items():
        getattr(model, part).requires_grad_(name in trained)
    flops = model_flops(model)
    dataset = PackDataset(index, processor, "sqrt", 4, Limits())
    ids = np.arange(12)
    batch = dataset.batch(MicroBatchPlan(Position(), True, ids, np.where(index.num_images[ids] > 0, 12, 0), 1.0))
    lengths = batch.cu_seq_lens.diff()
    ours = flops.vision(len(batch.tile_counts), batch.visual_positions.shape[0])
    ours += flops.language(batch.input_ids.shape[1], num_pairs(lengths), batch.targets.shape[0])
    found = counted(model, batch, processor.image_processor.normalised)
    # plain products are of all pairs, half of which the mask then drops; model FLOPs are the causal half
    all_pairs = int((lengths.long() ** 2).sum())
    extra = flops.per_pair * (all_pairs - num_pairs(lengths))
    assert ours + extra == pytest.approx(found, rel=0.06), (ours, extra, found)


def test_pairs_are_each_token_with_itself_and_those_before():
    lengths = torch.tensor([1, 2, 5], dtype=torch.int32)
    assert num_pairs(lengths) == sum(len([(i, j) for i in range(n) for j in range(i + 1)]) for n in lengths.tolist())
    assert num_pairs(torch.tensor([100_000], dtype=torch.int32)) == 5_000_050_000  # no overflow of int32


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 80GB HBM3", 989.4e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989.4e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA GB200", 2450e12),
    ("Tesla V100-SXM2-16GB", None),
    ("cpu", None),
])  # fmt: skip
def test_a_device_is_known_by_its_name_or_not_at_all(name, peak):
    assert peak_flops(name, "bf16") == peak
    assert peak_flops(name, "fp32") is None
