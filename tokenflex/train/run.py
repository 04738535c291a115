"""A whole run: data, model, engine, loop, export. What `launch/train.py` calls once the configuration is read."""

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import parallel
from ..budget import VisualTokenBudget
from ..checkpoint import complete_checkpoints, load_newest_checkpoint
from ..config import save_config
from ..data import (
    PackDataset,
    Planner,
    Position,
    batch_loader,
    embedded_corpus,
)
from ..data.loader import micro_batches, num_micro_steps
from ..data.sources import build_indexes, locate_sources, open_mixture, uses_corpus
from ..errors import UserError
from ..export import export_model
from ..model import build_model, build_processor
from .loop import train
from .meter import Meter
from .optimizer import build_optimizer


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what."""

    root: Path

    @property
    def checkpoints(self):
        return self.root / "checkpoints"

    @property
    def model(self):
        return self.root / "model"

    @property
    def accuracy(self):
        return self.root / "accuracy.json"


def run_folder(config):
    """The folder of a configured run."""
    return RunFolder(Path(config.output_dir).expanduser() / config.name)


def run_training(config, ds_config, launch, fresh=False, say=print):
    """Train (or go on training) a configured run and export its model.

    Every rank calls it. Returns whether the run is complete; a run that was interrupted has saved a checkpoint, from which
    the same call goes on. `say(text)` prints on rank 0 only.

    Raises:
        UserError: whatever in configuration or data the user can mend.
    """
    folder = run_folder(config)
    num_accumulated = num_micro_steps(config.data.packs_per_step, launch.num_ranks, config.data.packs_per_micro_batch)
    device = parallel.start_process_group(launch)
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    ds_config = parallel.resolve_ds_config(ds_config, precision, num_accumulated, config.optimizer.max_grad_norm)
    _prepare_folder(folder, config, launch, fresh)
    planner, dataset, processor = prepare_data(config, launch, say)
    say(f"data      {planner.epoch_size} samples per epoch from {len(planner.mixture.sources)} sources")

    torch.manual_seed(config.train.seed)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    loading = functools.partial(parallel.sharded_loading, ds_config)
    model = build_model(config.model, config.budget, processor, dtype, loading)
    optimizer, peak_rates = build_optimizer(model, config.optimizer)
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    engine = parallel.Engine(model, optimizer, ds_config, launch, device)
    say(
        f"model     {num_parameters / 1e6:.2f}M parameters, {precision} on {launch.num_ranks} x {device.type}, "
        f"ZeRO stage {parallel.zero_stage(ds_config)}, {num_accumulated} micro-steps per step"
    )

    progress = load_newest_checkpoint(engine, folder.checkpoints) or {"step": 0, "position": {"epoch": 0, "step": 0}}
    if progress["step"]:
        say(f"resumed   from {folder.checkpoints} at step {progress['step']}")
    _set_random_state(config.train.seed, progress["step"], launch.rank)
    position = Position(**progress["position"])
    _check_same_plan(planner, position)
    steps = planner.steps_from(position)
    plans = micro_batches(steps, launch.rank, launch.num_ranks, config.data.packs_per_micro_batch)
    batches = batch_loader(
        dataset,
        _first(plans, (config.train.num_steps - progress["step"]) * num_accumulated),
        config.data.num_workers,
        device.type == "cuda",
    )
    meter = Meter(folder.root, config, progress["step"], launch.rank == 0)
    try:
        is_complete = train(
            engine,
            batches,
            processor.image_processor.normalised,
            peak_rates,
            config,
            progress,
            folder.checkpoints,
            meter,
        )
    finally:
        meter.close()
        batches.close()
    for reason, number in planner.left_out.numbers.items():
        some = ", ".join(str(sample) for sample in planner.left_out.ids[reason][:10])
        say(f"data      {number} samples {reason} so far: {some}")
    if is_complete:
        state = engine.full_state()
        if launch.rank == 0:
            export_model(engine.model, state, processor, folder.model)
        torch.distributed.barrier()
    engine.close()
    return is_complete


def prepare_data(config, launch, say):
    """Corpus (built at first run), processor, index and planner; rank 0 builds what is missing, the others wait."""
    needs_corpus = uses_corpus(config.data) or "embedded" in config.data.evaluation
    if launch.rank == 0 and needs_corpus:
        embedded_corpus(config.data, say)
    torch.distributed.barrier()
    corpus = embedded_corpus(config.data, say) if needs_corpus else None
    processor = build_processor(config.model, config.budget, str(corpus / "tokenizer") if corpus else "")
    located = locate_sources(config.data, corpus)
    if launch.rank == 0:
        build_indexes(located, processor, max(1, config.data.num_workers))
    torch.distributed.barrier()
    mixture = open_mixture(located, processor)
    budget = VisualTokenBudget(
        counts=config.budget.num_visual_tokens,
        probabilities=config.budget.probabilities,
        schedule=config.budget.schedule,
    )
    planner = Planner(mixture, budget, config.data, config.train.seed, config.train.loss_weighting)
    dataset = PackDataset(mixture, processor, config.train.loss_weighting, blank_count=min(budget.counts))
    return planner, dataset, processor


def _check_same_plan(planner, position):
    """Ranks that plan different packs would wait for each other in the first step: find out before it.

    Raises:
        UserError: on every rank, naming the first that differs.
    """
    digests = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, next(planner.steps_from(position)).digest())
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise UserError(
                f"data: rank {rank} plans {digest}, rank 0 plans {digests[0]}; do all nodes see the same index and package versions?"
            )


def _prepare_folder(folder, config, launch, fresh):
    """Make the run's folder; refuse to go on with a configuration that plans other data than the checkpoint's."""
    if launch.rank == 0:
        if fresh:
            for path in (folder.checkpoints, folder.model):
                shutil.rmtree(path, ignore_errors=True)
            (folder.root / "metrics.jsonl").unlink(missing_ok=True)
        folder.root.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    saved, plan = folder.root / "plan.json", _plan_settings(config)
    if complete_checkpoints(folder.checkpoints) and saved.exists():
        before = json.loads(saved.read_text())
        changed = sorted(key for key in {*plan, *before} if plan.get(key) != before.get(key))
        if changed:
            raise UserError(
                f"run {folder.root}: its checkpoints were made with another {', '.join(changed)}; set it back, choose another "
                "name=..., or begin anew with --fresh"
            )
    torch.distributed.barrier()
    if launch.rank == 0:
        saved.write_text(json.dumps(plan, indent=1))
        save_config(config, folder.root / "config.yaml")


def _plan_settings(config):
    """Everything that decides the plan: a position in the data means nothing under other settings."""
    apart = {"num_workers", "cache_dir", "shard_cache_gb", "evaluation", "packs_per_micro_batch"}
    data = {f"data.{key}": value for key, value in config.data.model_dump(mode="json").items() if key not in apart}
    budget = {f"budget.{key}": value for key, value in config.budget.model_dump(mode="json").items()}
    return {**data, **budget, "train.seed": config.train.seed}


def _set_random_state(seed, step, rank):
    """Dropout draws from here on depend on (seed, step, rank) alone, so a resumed run draws as if it had not stopped."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)


def _first(items, number):
    for _, item in zip(range(number), items):
        yield item
