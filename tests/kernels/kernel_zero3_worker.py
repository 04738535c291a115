"""One rank of a ZeRO-3 job: ``python kernel_zero3_worker.py RANK WORLD_SIZE PORT OUT``; every variant in turn.

Trains a projector whose forward hands its submodules' weights to ``pooled_swiglu``, on this rank's half of a fixed batch,
and writes losses and final weights; the test compares them with plain torch on the whole batch.
"""

import os
import sys
from pathlib import Path

import torch
from tokenflex_kernels import pool_plan
from torch import nn
from torch.utils.checkpoint import checkpoint

GRIDS, SIDES = ((5, 4), (3, 3)), ((2, 3), (4, 1))
WIDTH, INNER, OUT = 6, 10, 8
NUM_ROWS = sum(h * w for h, w in GRIDS)
VARIANTS = ("plain", "frozen", "recompute", "checkpoint")
STEPS = 3


class Model(nn.Module):
    """A stand-in for the vision tower, then the projector written as a user of the package would."""

    def __init__(self, pooled_swiglu, norm_type, linear_type, variant):
        super().__init__()
        self.vision = nn.Linear(WIDTH, WIDTH)
        self.projector = Projector(pooled_swiglu, norm_type, linear_type, variant == "recompute")
        self.is_checkpointed = variant == "checkpoint"
        if variant == "frozen":
            self.vision.requires_grad_(False)

    def forward(self, patches):
        features = self.vision(patches)
        if self.is_checkpointed:
            return checkpoint(self.projector, features, use_reentrant=False)
        return self.projector(features)


class Projector(nn.Module):
    def __init__(self, pooled_swiglu, norm_type, linear_type, recompute):
        super().__init__()
        self.norm, self.gate_up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, OUT)
        self.types = (norm_type, linear_type)
        self.pooled_swiglu, self.options = pooled_swiglu, {"recompute": True} if recompute else {}

    def forward(self, features):
        norm, linear = self.types
        return self.pooled_swiglu(
            features, pool_plan(GRIDS, SIDES), norm(self.norm.weight, self.norm.bias, self.norm.eps),
            linear(self.gate_up.weight, self.gate_up.bias), linear(self.down.weight, self.down.bias), **self.options,
        )  # fmt: skip


def initialise(model):
    """The same unremarkable weights everywhere."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def batch(step, world_size):
    """Patches and targets of every rank at ``step``."""
    generator = torch.Generator().manual_seed(1 + step)
    num_tokens = sum(h * w for h, w in SIDES)
    return [
        (torch.randn(NUM_ROWS, WIDTH, generator=generator), torch.randn(num_tokens, OUT, generator=generator))
        for _ in range(world_size)
    ]


def loss_of(output, target):
    return (output - target).square().mean()


def train(variant, rank, world_size):
    """Losses and final weights of one variant."""
    import deepspeed
    from tokenflex_kernels import Linear, Norm, pooled_swiglu

    model = Model(pooled_swiglu, Norm, Linear, variant)
    initialise(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        # Every weight freed after its pass, none kept because it is small or soon used again.
        "zero_optimization": {
            "stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
        },
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # the default is 1.0
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.1), config=config)
    losses = []
    for step in range(STEPS):
        patches, target = batch(step, world_size)[rank]
        loss = loss_of(engine(patches), target)
        # Nothing may keep a gathered weight alive between the passes.
        assert all(p.numel() == 0 for p in model.projector.parameters()), "a weight is still gathered after forward"
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"losses": losses, "weights": weights}


def main(rank, world_size, port, out):
    os.environ |= {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # or DeepSpeed would build its shared-memory collectives with a C++ compiler
    deepspeed.init_distributed("gloo", verbose=False)
    torch.save({variant: train(variant, int(rank), int(world_size)) for variant in VARIANTS}, Path(out))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
