"""Law: the projector is the released one: pool -> LayerNorm -> SwiGLU of inner width 3C -> text width."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenflex.data import Limits, PackDataset
from tokenflex.data.loader import MicroBatchPlan
from tokenflex.model import projector as projector_module
from tokenflex.model.projector import TokenAdaptiveProjector
from tokenflex.plan import Position
from tokenflex.train.objective import Objective


class ReleasedProjector(nn.Module):
    """`TokenAdaptiveProjector` of the authors' release, stated plainly: LayerNorm, two gates of width 3C, SiLU, g."""

    def __init__(self, vision_width, text_width):
        super().__init__()
        self.norm = nn.LayerNorm(vision_width)
        self.f1 = nn.Linear(vision_width, 3 * vision_width)
        self.f2 = nn.Linear(vision_width, 3 * vision_width)
        self.g = nn.Linear(3 * vision_width, text_width)

    def forward(self, features_BLC, n):
        batch, length, width = features_BLC.shape
        side = round(length**0.5)
        maps = features_BLC.transpose(1, 2).reshape(batch, width, side, side)
        target = -(-side // n) * n
        maps = F.interpolate(maps, size=(target, target), mode="bilinear", align_corners=True)
        x = F.adaptive_avg_pool2d(maps, (n, n)).flatten(2).transpose(1, 2)
        x = self.norm(x)
        return self.g(F.silu(self.f1(x)) * self.f2(x))


def test_resize_projector_is_the_released_one_forward_and_backward():
    torch.manual_seed(0)
    theirs = ReleasedProjector(12, 20).double()
    ours = TokenAdaptiveProjector(12, 20, mode="resize").double()
    ours.load_state_dict(
        {
            "norm.weight": theirs.norm.weight,
            "norm.bias": theirs.norm.bias,
            "gate_up.weight": torch.cat([theirs.f1.weight, theirs.f2.weight]),
            "gate_up.bias": torch.cat([theirs.f1.bias, theirs.f2.bias]),
            "down.weight": theirs.g.weight,
            "down.bias": theirs.g.bias,
        }
    )
    for n in (3, 8, 12, 16):
        features = torch.randn(2, 27 * 27, 12, dtype=torch.float64)
        mine, released = features.clone().requires_grad_(), features.clone().requires_grad_()
        output = ours(mine.flatten(0, 1), [(27, 27)] * 2, [(n, n)] * 2)
        expected = theirs(released, n).flatten(0, 1)
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
        weight = torch.randn_like(expected)
        (output * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(mine.grad, released.grad, rtol=1e-9, atol=1e-10)


def test_size_at_the_papers_widths():
    """1152 -> 3584 with inner width 3456: about 20.4M parameters, as the release has."""
    with torch.device("meta"):
        projector = TokenAdaptiveProjector(1152, 3584)
    assert abs(sum(p.numel() for p in projector.parameters()) / 20.4e6 - 1) < 0.01


def test_starting_anew_is_the_constructors_start():
    torch.manual_seed(0)
    projector = TokenAdaptiveProjector(64, 96)
    drawn = {name: value.clone() for name, value in projector.state_dict().items()}
    for parameter in projector.parameters():
        parameter.data.fill_(torch.nan)
    torch.manual_seed(0)
    projector.reset_parameters()
    torch.testing.assert_close(projector.state_dict(), drawn, rtol=0, atol=0)


class Called(TorchDispatchMode):
    """Which operators of the kernels' package run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tokenflex_kernels":
            self.names.add(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def test_a_step_through_the_kernels_operators_is_the_plain_step(model, processor, index):
    """Pooling, projector and splice: the same loss and gradients, and on no other backend are they used."""
    pytest.importorskip("tokenflex_kernels")
    ids = np.concatenate([np.flatnonzero(index.num_images == number)[:2] for number in (0, 1, 2)])
    counts = np.where(index.num_images[ids] > 0, np.resize([4, 12, 7], len(ids)), 0)
    dataset = PackDataset(index, processor, "sqrt", blank_count=4, limits=Limits())
    plan = MicroBatchPlan(Position(), True, ids, counts, 5.0)
    batches = {backend: dataset.batch(plan) for backend in ("reference", "auto", "kernels")}
    model.projector.backend = "kernels"
    dataset.plan_of = pickle.loads(pickle.dumps(model.projector.plan_maker(model.patch_grid, torch.empty(0))))
    batches["planned"] = dataset.batch(plan).to("cpu")
    assert batches["planned"].pool_plan.num_tokens == len(batches["planned"].visual_positions)
    losses, gradients, called = {}, {}, {}
    for backend, batch in batches.items():
        model.projector.backend = "kernels" if backend == "planned" else backend
        model.zero_grad()
        with Called() as seen:
            losses[backend] = Objective(model, processor.image_processor.normalised)(batch).total
            losses[backend].backward()
        called[backend] = seen.names
        gradients[backend] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert called["kernels"] == {"project_training", "project_backward_", "splice", "splice_backward"}
    assert not called["reference"] and not called["auto"], "auto is plain torch on CPU"
    assert called["planned"] == called["kernels"] and losses["planned"] == losses["kernels"]
    torch.testing.assert_close(losses["kernels"], losses["reference"], rtol=1e-6, atol=0)
    assert gradients["kernels"].keys() == gradients["reference"].keys()
    scale = torch.cat([grad.flatten() for grad in gradients["reference"].values()]).norm()
    for name, wanted in gradients["reference"].items():
        assert (gradients["kernels"][name] - wanted).norm() <= 1e-6 * scale, name


def test_without_the_kernels_auto_is_plain_and_kernels_says_so(monkeypatch):
    monkeypatch.setattr(projector_module, "tokenflex_kernels", None)
    features = torch.randn(6, 4)
    assert TokenAdaptiveProjector(4, 8)(features, [(2, 3)], [(1, 2)]).shape == (2, 8)
    with pytest.raises(ImportError, match="tokenflex_kernels is not installed; install it, or set 'auto'"):
        TokenAdaptiveProjector(4, 8, backend="kernels")(features, [(2, 3)], [(1, 2)])


@pytest.mark.parametrize("backend", ["reference", "kernels"])
@pytest.mark.parametrize("mode", ["adaptive", "resize"])
def test_detail_counts_for_nothing_until_it_is_learned(backend, mode):
    """At a share of 0 the projector is the plain one to the bit, at 1 it pools maxima, and the share has a gradient at once."""
    grids, sides = [(6, 4), (6, 4), (5, 7)], [(2, 2), (3, 1), (2, 3)]
    features = torch.randn(24 + 24 + 35, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = TokenAdaptiveProjector(8, 6, mode=mode, backend="reference")
    detailed = TokenAdaptiveProjector(8, 6, mode=mode, backend=backend, detail="max")
    detailed.load_state_dict({**plain.state_dict(), "detail_share": torch.zeros(8)})
    out = detailed(features, grids, sides)
    torch.testing.assert_close(out, plain(features, grids, sides), rtol=0, atol=1e-6 if backend == "kernels" else 0)
    out.square().sum().backward()
    assert detailed.detail_share.grad.abs().min() > 0
    detailed.detail_share.data.fill_(1.0)
    windows = [features[:24].view(6, 4, 8), features[24:48].view(6, 4, 8), features[48:].view(5, 7, 8)]
    peaks = [
        window[i * h // n : -(-(i + 1) * h // n), j * w // m : -(-(j + 1) * w // m)].amax((0, 1))
        for window, (h, w), (n, m) in zip(windows, grids, sides)
        for i in range(n)
        for j in range(m)
    ]
    gate, up = plain.gate_up(plain.norm(torch.stack(peaks))).chunk(2, -1)
    wanted = plain.down(torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(detailed(features, grids, sides), wanted, rtol=1e-5, atol=1e-6)
