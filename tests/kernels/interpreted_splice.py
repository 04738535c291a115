"""The splice kernel under Triton's interpreter. Run by test_kernel_interpreted.py."""

import pytest
import torch
from kernel_checks import DTYPES, poison_allocations, same_bits
from tokenflex_kernels import reference, splice_rows, target


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    assert target.is_interpreted()
    poison_allocations(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_text, num_visual, width", [(13, 5, 24), (1, 1, 8), (6, 0, 3), (9, 9, 300), (0, 0, 8)])
def test_rows_go_where_they_belong_and_gradients_come_back(dtype, num_text, num_visual, width):
    generator = torch.Generator().manual_seed(num_text)
    text = torch.randn(num_text, width, generator=generator).to(dtype)
    visual = torch.randn(num_visual, width, generator=generator).to(dtype)
    grad = torch.randn(num_text, width, generator=generator).to(dtype)
    positions = torch.randperm(num_text, generator=generator)[:num_visual]
    results = []
    for function in (splice_rows, splice_rows, reference.splice_rows):
        leaves = [text.clone().requires_grad_(), visual.clone().requires_grad_()]
        out = function(*leaves, positions)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for ours, again, wanted in zip(*results, strict=True):
        assert same_bits(ours, wanted) and same_bits(ours, again)


def test_only_the_wanted_gradient_is_made():
    text, visual, positions = torch.zeros(5, 4), torch.ones(2, 4, requires_grad=True), torch.tensor([4, 0])
    out = splice_rows(text, visual, positions)
    out.backward(torch.arange(20.0).view(5, 4))
    assert torch.equal(visual.grad, torch.tensor([[16.0, 17, 18, 19], [0, 1, 2, 3]])) and text.grad is None


def test_strided_rows():
    text, visual, positions = torch.randn(8, 6).t(), torch.randn(8, 2).t(), torch.tensor([1, 5])
    wanted = text.clone()
    wanted[positions] = visual
    assert torch.equal(splice_rows(text, visual, positions), wanted)
