"""One rank that trains a model for a step at each ZeRO stage and counts the bytes of every tensor that is there.

`measured_memory.py RECIPE PRECISION STAGES [OVERRIDE ...]`; runs under a launcher's variables (RANK, WORLD_SIZE, ...). Rank 0 prints a line of
JSON per stage: bytes by cause as `tokenflex.estimate.memory` names them.
"""

import gc
import json
import sys
import tempfile
import warnings

import torch

from tokenflex import parallel
from tokenflex.config import load_config
from tokenflex.corpus.tokenizer import build_tokenizer
from tokenflex.model import build_model, build_processor
from tokenflex.model.attention import packing
from tokenflex.train.optimizer import make_optimizer, parameter_groups

BUCKET = 1_000_000
NUM_TOKENS = 32


def ds_config_of(stage):
    """The DeepSpeed configuration that is measured, before the trainer has resolved it."""
    zero = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": 10_000,
        "stage3_max_live_parameters": 2_000_000,
        "stage3_max_reuse_distance": 2_000_000,
        "stage3_prefetch_bucket_size": 200_000,
    }
    return {"zero_optimization": zero}


def main(recipe, precision, stages, *overrides):
    parallel.quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer().save_pretrained(folder)
        config = load_config(recipe, [f"model.tokenizer={folder}", *overrides])
        processor = build_processor(config.model, config.budget)
    ranks = parallel.join_ranks(parallel.join())
    for stage in map(int, stages.split(",")):
        figures = measure(config, processor, precision, stage, ranks)
        if ranks.is_main:
            print(json.dumps({"stage": stage, **figures}), flush=True)


def measure(config, processor, precision, stage, ranks):
    ds_config = parallel.resolve_ds_config(ds_config_of(stage), precision, 2, 1.0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    model = build_model(config.model, config.budget, processor, dtype)
    groups = parameter_groups(model, config.optimizer)
    engine = parallel.Engine(model, make_optimizer(groups, config.optimizer), ds_config, ranks)
    del model, groups
    rates = [group["lr"] for group in engine._engine.optimizer.param_groups]
    gathered = Gathered(engine.model)
    figures = {}
    for step in range(2):
        for micro in range(2):
            engine.backward(loss_of(engine))
            if step == 1:  # moments are there from the first update on
                now = bytes_by_cause(engine, stage)
                figures = {name: max(value, figures.get(name, 0)) for name, value in now.items()}
            engine.step(rates, (lambda norm: "") if micro else None)
    figures["gathered"] = gathered.most * dtype.itemsize
    engine.close()
    del engine, gathered
    gc.collect()
    return figures


def loss_of(engine):
    config = engine.model.config
    count = min(config.trained_num_visual_tokens)
    bounds = torch.tensor([0, NUM_TOKENS], dtype=torch.int32)
    outputs = engine(
        input_ids=torch.full((1, NUM_TOKENS), 3),
        position_ids=torch.arange(NUM_TOKENS)[None],
        pixel_values=torch.rand(1, 3, config.image_height, config.image_width).to(engine.dtype),
        num_visual_tokens=[count],
        visual_positions=torch.arange(count),
        logits_to_keep=torch.arange(count, NUM_TOKENS),
        **packing(bounds, NUM_TOKENS, NUM_TOKENS),
    )
    return outputs.logits.float().square().mean()


class Gathered:
    """The most parameters that were whole at the entrance of any module, beside those that always are."""

    def __init__(self, model):
        self.most = 0
        self.parameters = [p for p in model.parameters() if hasattr(p, "ds_id") and not p.ds_persist]
        for module in model.modules():
            module.register_forward_hook(self.look)
            module.register_full_backward_hook(self.look)

    def look(self, *anything):
        self.most = max(self.most, sum(p.ds_numel for p in self.parameters if p.data.numel() == p.ds_numel))


def bytes_by_cause(engine, stage):
    parameters = list(engine.model.parameters())
    weights = [p.ds_tensor if stage == 3 else p for p in parameters]
    if stage == 3:  # what is whole all the time is there besides its slice
        weights += [p.data for p in parameters if p.ds_persist]
    moments = [t for state in engine._optimizer.state.values() for t in state.values() if t.dim()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    seen, figures = set(), {}
    for name, tensors in (("weights", weights), ("moments", moments)):
        figures[name] = sum(size(tensor, seen) for tensor in tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it takes to ask everything that is there
        everything = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and not item.is_meta]
    figures["masters_gradients_buffers"] = sum(size(tensor, seen) for tensor in [*gradients, *everything])
    return figures


def size(tensor, seen):
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen or not storage.nbytes():
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()


if __name__ == "__main__":
    main(*sys.argv[1:])
