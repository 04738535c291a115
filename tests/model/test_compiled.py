"""Laws of compiled blocks: the same losses and gradients, and another length of pack compiles nothing."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from tokenflex.model.attention import packing
from tokenflex.model.compiled import compile_blocks, repeated_blocks

WARM = [([40, 50], 3), ([100], 1)]
OTHERS = [([33, 21, 60], 5), ([20, 20, 20, 20], 2), ([77, 13], 4), ([200, 30], 6), ([5], 1)]
"""(lengths of a pack's samples, images). torch compiles a dimension of 1 apart, hence the second batch that warms up."""


def run(model, lengths, num_images):
    """Loss and gradients of one pack."""
    total, draw = sum(lengths), torch.Generator().manual_seed(sum(lengths))
    begins = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    num_visual = min(4 * num_images, total)
    outputs = model(
        input_ids=torch.randint(10, 60, (1, total), generator=draw),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        pixel_values=torch.randn(num_images, 3, 48, 64, generator=draw),
        num_visual_tokens=[4] * num_images,
        visual_positions=torch.arange(num_visual),
        **packing(begins, max(lengths), total),
    )
    model.zero_grad()
    loss = outputs.logits.square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_losses_and_gradients_are_equal_and_lengths_compile_nothing(backend, model):
    torch._dynamo.reset()
    counters.clear()
    compiled = copy.deepcopy(model)
    num_blocks = len([*repeated_blocks(model.vision_tower), *repeated_blocks(model.language_model)])
    assert compile_blocks(compiled, backend) == num_blocks == 3
    for number, (lengths, num_images) in enumerate([*WARM, *(pack for pack in OTHERS if sum(pack[0]) >= 4 * pack[1])]):
        plain, ours = run(model, lengths, num_images), run(compiled, lengths, num_images)
        torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=1e-7)
        for name, gradient in plain[1].items():
            torch.testing.assert_close(ours[1][name], gradient, rtol=1e-3, atol=1e-6)
        if number == len(WARM) - 1:
            num_graphs = counters["stats"]["unique_graphs"]
    assert 0 < num_graphs < 12 and counters["stats"]["unique_graphs"] == num_graphs, "another length was compiled"
