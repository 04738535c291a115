"""Law: the projector is the released one: pool -> LayerNorm -> SwiGLU of inner width 3C -> text width."""

import torch
import torch.nn.functional as F
from torch import nn

from tokenflex.model.projector import TokenAdaptiveProjector


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


def test_start_keeps_the_scale_of_its_input():
    torch.manual_seed(0)
    projector = TokenAdaptiveProjector(64, 96)
    projector.reset_parameters()
    output = projector(torch.randn(256, 64) * 5 + 1, [(16, 16)], [(16, 16)])
    assert 0.2 < output.std() < 1.0
