"""A run's kernel choices: made once by rank 0, taken by all, and taken up again from a checkpoint."""

import json

import pytest
import tokenflex_kernels
import torch
from torch import nn

from tokenflex.model.projector import TokenAdaptiveProjector
from tokenflex.train.kernel_choices import settle, shapes_of


class Model(nn.Module):
    """What settle asks of a model."""

    patch_grid = (4, 4)

    def __init__(self, backend):
        super().__init__()
        self.vision_tower = nn.Linear(2, 2)
        self.projector = TokenAdaptiveProjector(8, 6, backend=backend)


class Ranks:
    """Rank 0 or another of two, that hands over what rank 0 said."""

    def __init__(self, said=None):
        self.said, self.asked = said, 0

    def on_main(self, function):
        self.asked += 1
        return function() if self.said is None else self.said


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(tokenflex_kernels.choose, "_state", tokenflex_kernels.choose._State())


def test_batches_that_stand_for_all():
    assert shapes_of([9, 4, 9], 5) == [[4] * n for n in (1, 2, 4, 5)] + [[9] * n for n in (1, 2, 4, 5)]
    assert shapes_of([4], 1) == [[4]]


def test_rank_0_chooses_the_others_take_it_and_a_resumed_run_takes_it_up():
    shapes = shapes_of([4, 9], 2)
    chosen = settle(Model("kernels"), shapes, Ranks(), None)
    assert json.loads(json.dumps(chosen)) == chosen and set(chosen) >= {"chosen"}
    assert tokenflex_kernels.choose._state.mode == "rule"
    said = {"chosen": {"gated|some GPU": "tma"}}
    assert settle(Model("kernels"), shapes, Ranks(said), None) == said
    assert tokenflex_kernels.export_choices()["chosen"]["gated|some GPU"] == "tma"
    resumed = Ranks()
    assert settle(Model("kernels"), shapes, resumed, chosen) == chosen and not resumed.asked


def test_where_no_kernel_runs_nothing_is_settled():
    ranks = Ranks()
    assert settle(Model("auto"), [[4]], ranks, None) is None is settle(Model("reference"), [[4]], ranks, None)
    assert not ranks.asked and tokenflex_kernels.choose._state.mode == "measure"
    assert not torch.cuda.is_initialized()
