"""A whole run: data, model, engine, loop, export. What `launch/train.py` calls once the configuration is read."""

import contextlib
import functools
import json
import os
import secrets
import shutil

import torch

from .. import failpoints, parallel
from ..budget import VisualTokenBudget
from ..checkpoint import EarlyCheck, RunLock, tags
from ..config import save_config
from ..corpus import resolve_embedded
from ..data import Limits, PackDataset, batch_loader
from ..data.loader import micro_batches, num_micro_steps
from ..data.sources import build_indexes, locate_sources, open_mixture
from ..errors import OtherRankFailed, UserError
from ..export import export_model
from ..layout import RunLayout
from ..model import build_model, build_processor
from ..model.probe import probe
from ..plan import Planner, Position
from ..plan.planner import PLANNER_VERSION
from .bad_samples import BadSampleLog
from .loop import StopRequest, install_faults, train
from .meter import Meter
from .optimizer import build_optimizer
from .state import RunState


def run_training(config, ds_config, launch, fresh=False, say=print):
    """Train (or go on training) a configured run and export its model.

    Every rank calls it. Returns whether the run is complete; a run that was interrupted has saved a checkpoint, from which
    the same call goes on. `say(text)` prints on rank 0 only.

    Raises:
        UserError: whatever in configuration or data the user can mend.
    """
    folder = RunLayout.of(config)
    num_accumulated = num_micro_steps(config.data.packs_per_step, launch.num_ranks, config.data.packs_per_micro_batch)
    device = parallel.start_process_group(launch)
    ranks = parallel.Ranks(launch)
    say(f"world     {parallel.check_world(launch, device)}")
    failpoints.enter(launch.rank)
    with StopRequest() as stop, _locked(folder, ranks), _watched(folder, config, launch, ranks) as heart:
        return _train_and_export(
            config, ds_config, launch, ranks, device, num_accumulated, folder, fresh, stop, heart, say
        )


@contextlib.contextmanager
def _watched(folder, config, launch, ranks):
    """Within this context a watchdog looks after this rank; an error that only echoes another rank's says so.

    Raises:
        OtherRankFailed: another rank failed or died first.
    """
    if launch.rank == 0 and folder.health.exists():
        shutil.rmtree(folder.health)
    attempt = ranks.on_main(lambda: secrets.token_hex(4))
    heart = parallel.Heart(launch, folder.health / attempt, config.train.hang_timeout_s, config.train.startup_timeout_s)
    try:
        yield heart
    except Exception as error:
        first = heart.failed(error)
        if first:
            raise OtherRankFailed(f"rank {launch.rank} ended, because {first}") from None
        raise
    heart.close()


@contextlib.contextmanager
def _locked(folder, ranks):
    """Within this context no other job may write to the run's folder."""
    lock = None

    def acquire():
        nonlocal lock
        folder.root.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder.root)

    ranks.on_main(acquire)
    try:
        yield
    finally:
        if lock:
            lock.release()


def _train_and_export(config, ds_config, launch, ranks, device, num_accumulated, folder, fresh, stop, heart, say):
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    ds_config = parallel.resolve_ds_config(ds_config, precision, num_accumulated, config.optimizer.max_grad_norm)
    ranks.on_main(lambda: _prepare_folder(folder, config, fresh))
    check = EarlyCheck(folder.checkpoints, launch.rank, launch.num_ranks)
    config = resolve_embedded(config, say)
    planner, dataset, processor = prepare_data(config, launch, say)
    say(f"data      {planner.epoch_size} samples per epoch from {len(planner.mixture.sources)} sources")

    torch.manual_seed(config.train.seed)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    loading = functools.partial(parallel.sharded_loading, ds_config)
    model = build_model(config.model, config.budget, processor, dtype, loading, parallel.gathered)
    optimizer, peak_rates = build_optimizer(model, config.optimizer)
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    engine = parallel.Engine(model, optimizer, ds_config, launch, device)
    if config.model.probe:
        heart.phase("probe", config.train.startup_timeout_s)
        probe(engine.model, engine, device, config.data.pack_length)
    install_faults(engine.model)
    failpoints.hit("init")
    say(
        f"model     {num_parameters / 1e6:.2f}M parameters, {precision} on {launch.num_ranks} x {device.type}, "
        f"ZeRO stage {parallel.zero_stage(ds_config)}, {num_accumulated} micro-steps per step"
    )

    state = RunState(engine, ranks, config, folder.checkpoints, heart, say)
    if not state.resume(check) and not fresh:
        say(f"new run   {folder.root}: there is no checkpoint")

    first = next(planner.steps_from(Position(**state.progress["position"])))
    ranks.check_same_plan(first.digest(), "the first step to run")  # different packs could hang it

    def open_batches(progress):
        passed_over = {tuple(position) for position in progress["passed_over"]}
        steps = planner.steps_from(Position(**progress["position"]))
        steps = (step for step in steps if (step.position.epoch, step.position.step) not in passed_over)
        plans = micro_batches(steps, launch.rank, launch.num_ranks, config.data.packs_per_micro_batch)
        num_left = (config.train.num_steps - progress["step"]) * num_accumulated
        return batch_loader(dataset, _first(plans, num_left), config.data.num_workers, device.type == "cuda")

    def name_of(sample_id):
        return f"{dataset.mixture.shard_of(sample_id)}:{dataset.sample(sample_id).key}"

    meter = Meter(folder.root, config, state.progress["step"], launch, name_of)
    state.log = meter.event
    try:
        is_complete = train(
            state,
            open_batches,
            processor.image_processor.normalised,
            peak_rates,
            config,
            meter,
            stop,
            BadSampleLog(folder.root, launch.rank, config.data.max_bad_fraction, state.progress),
        )
    finally:
        meter.close()
    for reason, number in planner.left_out.numbers.items():
        some = ", ".join(str(sample) for sample in planner.left_out.ids[reason][:10])
        say(f"data      {number} samples {reason} so far: {some}")
    heart.phase("export", config.train.startup_timeout_s)
    if is_complete:
        full = engine.full_state()
        ranks.on_main(lambda: export_model(engine.model, full, processor, folder.model))
    engine.close()
    return is_complete


def prepare_data(config, launch, say):
    """Corpus (built at first run), processor, index and planner; rank 0 builds what is missing, the others wait."""
    processor = build_processor(config.model, config.budget)
    located = locate_sources(config.data)
    limits = Limits.of(config.data)
    if launch.rank == 0:
        build_indexes(located, processor, max(1, config.data.num_workers), limits)
    torch.distributed.barrier()
    mixture = open_mixture(located, processor)
    for source, (_, _, folder) in zip(mixture.sources, located):
        if source.index.num_skipped():
            say(f"index     {source.index.num_skipped()} bad samples left out; {folder / 'manifest.json'} names them")
    budget = VisualTokenBudget(
        counts=config.budget.num_visual_tokens,
        probabilities=config.budget.probabilities,
        schedule=config.budget.schedule,
    )
    planner = Planner(mixture, budget, config.data, config.train.seed, config.train.loss_weighting)
    dataset = PackDataset(mixture, processor, config.train.loss_weighting, min(budget.counts), limits)
    return planner, dataset, processor


def _prepare_folder(folder, config, fresh):
    """Make the run's folder ready; refuse to go on with a configuration that plans other data than the checkpoints'."""
    if fresh:
        for path in (folder.checkpoints, folder.model):
            if path.exists():
                shutil.rmtree(path)
        for path in [*folder.root.glob("*.jsonl")]:
            path.unlink()
    saved, plan = folder.root / "plan.json", _plan_settings(config)
    if tags(folder.checkpoints) and saved.exists():
        before = json.loads(saved.read_text())
        changed = sorted(key for key in {*plan, *before} if plan.get(key) != before.get(key))
        if changed:
            mend = "take the release of tokenflex that made them" if changed == ["planner.version"] else "set it back"
            raise UserError(
                f"run {folder.root}: its checkpoints were made with another {', '.join(changed)}; {mend}, choose another "
                "name=..., or begin anew with --fresh"
            )
    temporary = saved.with_suffix(".tmp")
    temporary.write_text(json.dumps(plan, indent=1))
    os.replace(temporary, saved)
    save_config(config, folder.root / "config.yaml")


def _plan_settings(config):
    """Everything that decides the plan: a position in the data means nothing under other settings."""
    apart = {"num_workers", "cache_dir", "shard_cache_gb", "evaluation", "packs_per_micro_batch"}
    data = {f"data.{key}": value for key, value in config.data.model_dump(mode="json").items() if key not in apart}
    budget = {f"budget.{key}": value for key, value in config.budget.model_dump(mode="json").items()}
    return {**data, **budget, "train.seed": config.train.seed, "planner.version": PLANNER_VERSION}


def _first(items, number):
    for _, item in zip(range(number), items):
        yield item
