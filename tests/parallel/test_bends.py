"""The places where DeepSpeed is bent still bear it: each is tried on a real engine of every stage, so that a release that
moves one of them fails here and is named."""

import pytest
from conftest import run_ranks

BENT = """
import sys
import torch
from tokenflex import parallel
from tokenflex.parallel import bends

stage, precision = int(sys.argv[1]), sys.argv[2]
parallel.quiet_libraries()
ranks = parallel.join_ranks(parallel.join())
import deepspeed

assert deepspeed.ops.__compatible_ops__ == {}, "the table of operators is elsewhere"
torch.manual_seed(0)
layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
model = layers.bfloat16() if precision == "bf16" else layers
weights = [p.detach().clone() for p in model.parameters()]
ds_config = parallel.resolve_ds_config({"zero_optimization": {"stage": stage}}, precision, 1, 0.0)
calls = []


class Asking(torch.optim.AdamW):
    def __init__(self, should_skip, map_matrices):
        self.should_skip = should_skip
        super().__init__(model.parameters(), lr=0.1)

    def step(self, closure=None):
        calls.append(self.should_skip())
        return None if calls[-1] else super().step(closure)


engine = parallel.Engine(model, Asking, ds_config, ranks)
assert all(calls), "DeepSpeed ran the optimizer while it was being set up, and was not kept from it"
asked = []


def run(veto):
    x = torch.full((4, 8), 0.5, dtype=engine.dtype)
    engine.backward(engine._engine(x).float().square().mean() / ranks.num_ranks)
    return engine.step([0.1], veto)


wanted = None
for reason in ("not now", ""):
    before = {s.name: s.tensors["weight"].clone() for s in engine.slices()}
    update = run(lambda norm: asked.append(norm) or reason)
    assert update.vetoed == reason and update.grad_norm == asked[-1] > 0, (update, asked)
    moved = any(not torch.equal(before[s.name], s.tensors["weight"]) for s in engine.slices())
    assert moved == (reason == ""), "the veto was not heard" if moved else "the optimizer did not run"
    assert engine.num_updates == int(reason == "")
assert len(asked) == 2 and asked[0] == asked[1], "asked once per step, with the norm of that step's gradients"
names = {s.name for s in engine.slices()}
assert ranks.num_ranks > 1 or names == {name for name, _ in engine.model.named_parameters()}, names
print("BORE", stage, round(asked[0], 4))
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    "stage, precision", [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32")]
)
def test_every_stage_bears_the_bends(stage, precision, tmp_path):
    script = tmp_path / "bends.py"
    script.write_text(BENT)
    (end,) = run_ranks(1, [script, stage, precision])
    assert end.status == 0 and f"BORE {stage}" in end.output, end.output[-3000:]
