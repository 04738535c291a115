"""A whole run, stage by stage: prepare, build, resume, train, export. What `launch/train.py` calls once a recipe is read."""

import contextlib
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import cast

import torch
import yaml

from .. import doctor, failpoints, parallel
from ..checkpoint import EarlyCheck, tags
from ..config import RunConfig, save_config
from ..data import batch_loader
from ..data.held_out import HeldOut, open_held_out
from ..data.identity import after_change, check_same_data
from ..data.loader import micro_batches, num_micro_steps
from ..data.sources import DataRun, open_data, source_configs
from ..errors import UserError
from ..export import export_model
from ..files import write_whole
from ..layout import RunLayout, step_of
from ..model import TokenFlexProcessor, build_model, build_processor, check_counts, check_template
from ..model.adapters import check_adapters, merged, save_adapters
from ..model.compiled import compile_blocks
from ..model.probe import probe
from ..model.weights import weight_files
from ..parallel import Heartbeat, Ranks
from ..plan.ahead import ahead
from ..plan.planner import PLANNER_VERSION
from ..telemetry.flops import model_flops
from ..telemetry.peaks import peak_flops
from ..telemetry.sinks import Sink, check_sinks, open_sinks
from ..telemetry.stages import stage
from .answers import HeldOutAnswers
from .bad_samples import BadSampleLog
from .changes import check_branch, check_changes
from .consistency import Consistency
from .guarding import SoleWriter, watched
from .kernel_choices import settle, shapes_of
from .loss import fused_loss_head
from .metric_log import EventLog, MetricLog, SampleTrace
from .metrics import Metrics
from .objective import Objective
from .observers import FirstStep, Observer, StepFigures, WeightAverage
from .optimizer import make_optimizer, parameter_groups
from .profiling import ProfilePlan, Profiler
from .progress import Progress
from .schedule import Schedule
from .start import other_run, start
from .state import RunState
from .telemetry import Telemetry
from .trainer import Batches, StopRequest, Trainer
from .validation import Validation, check_validation

PLANS_AHEAD = 32
"""Micro-batches that are planned ahead of what workers read: enough for a window (0.4 s at 1,024 ranks) at 15 ms a micro-step."""


def run_training(
    recipe: RunConfig,
    config: RunConfig,
    ds_config: dict,
    ranks: Ranks,
    *,
    fresh: bool = False,
    accept_new_data: bool = False,
    profiled: ProfilePlan | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Train (or go on training) a configured run and export its model.

    Every rank calls it. Returns whether the run is complete; a run that was interrupted has saved a checkpoint, from which
    the same call goes on.

    Args:
        recipe: the configuration as it was written, which the run's folder and its checkpoints remember.
        config: the same with every part and source resolved to where it lies (`corpus.resolve_embedded`).
        ds_config: DeepSpeed's, from `parallel.load_ds_config`.
        fresh: begin anew, removing the run's checkpoints.
        accept_new_data: go on with other data than the checkpoints', from the next epoch.
        profiled: steps to profile, or None.
        say: prints on rank 0.

    Raises:
        UserError: whatever in configuration or data the user can mend.
    """
    layout = RunLayout.of(config)
    failpoints.enter(ranks.rank)
    with StopRequest() as stop, SoleWriter(layout, ranks), watched(layout, config.train, ranks) as heartbeat:
        run = Run(recipe, config, ds_config, ranks, heartbeat, say, profiled=profiled)
        run.prepare(fresh, accept_new_data)
        run.build()
        run.resume()
        is_complete = run.train(stop)
        if is_complete:
            run.export()
        run.close()
    return is_complete


def grad_accum_steps(config: RunConfig, num_ranks: int) -> int:
    """Micro-steps per optimizer step on so many ranks.

    Raises:
        UserError: the ranks do not divide the packs of a step.
    """
    data = config.data
    return num_micro_steps(data.packs_per_step, num_ranks, data.packs_per_micro_batch)


class Run:
    """A run in stages: call `prepare`, `build`, `resume`, `train` and `export` in this order, and stop after any of them.

    Every rank has one and calls the same stages. What a stage has made is an attribute from then on, for whoever looks at it
    (or changes it) before the next: `data`, `engine`, `objective`, `state`, `observers`.

    Args: see `run_training`; heartbeat: this rank's.
    """

    data: DataRun
    held_out: HeldOut | None = None
    engine: parallel.Engine
    objective: Objective
    state: RunState
    observers: list[Observer]

    def __init__(
        self,
        recipe: RunConfig,
        config: RunConfig,
        ds_config: dict,
        ranks: Ranks,
        heartbeat: Heartbeat,
        say: Callable[[str], None] = print,
        *,
        profiled: ProfilePlan | None = None,
    ):
        self.recipe, self.config, self.ranks, self.heartbeat, self.say = recipe, config, ranks, heartbeat, say
        self.profiled = profiled
        self.layout = RunLayout.of(config)
        self.grad_accum_steps = grad_accum_steps(config, ranks.num_ranks)
        self.precision = precision_of(config.train.precision, ranks.device)
        max_norm = config.optimizer.max_grad_norm
        self.ds_config = parallel.resolve_ds_config(ds_config, self.precision, self.grad_accum_steps, max_norm)
        self.metrics = Metrics()
        self.stop: StopRequest | None = None
        self.record_event = EventLog(self.layout, ranks)

    def _stage(self, name: str, what: str) -> AbstractContextManager[None]:
        return stage(name, what, self.say)

    def prepare(self, fresh: bool = False, accept_new_data: bool = False) -> None:
        """The run's folder, its data: processor, indexes, planner, data set.

        Raises:
            UserError: the folder's checkpoints were made with other data, or the data cannot be read or planned.
        """
        source_configs(self.config.data)  # a run without data is refused before anything else
        check_adapters(self.config.model)
        check_sinks(self.config.train)
        check_validation(self.config)
        if self.profiled:
            self.profiled.check(self.config.train.num_steps, self.ranks.num_ranks)
        for line in self.ranks.on_main(lambda: prepare_folder(self.layout, self.recipe, fresh)):
            self.say(line)
        # reads the newest checkpoint's bytes while the model is being built
        self._check = EarlyCheck(self.layout.checkpoints, self.ranks.rank, self.ranks.num_ranks)
        before = self.layout if tags(self.layout.checkpoints) else _layout_branched_from(self.recipe)
        identity = before.data if before else None
        self._accepts_new_data = accept_new_data
        self._data_before = json.loads(identity.read_text()) if identity and identity.exists() else None
        self.open_data(self._data_before["render_date"] if self._data_before else "")
        if self.config.evaluate.every:
            with self._stage("held out", "samples to validate on"):
                self.held_out = open_held_out(self.config, self.data.processor, self.ranks, self.say)

    def open_data(self, render_date: str = "") -> None:
        """Processor, indexes, planner and data set; the part of `prepare` that touches no folder of the run.

        Raises:
            UserError: the data cannot be read or planned.
        """
        processor = build_processor(self.config.model, self.config.budget)
        for note in check_template(processor):
            self.say(f"template  {note}")
        evaluate, data = self.config.evaluate, self.config.data
        if data.evaluation and (evaluate.every or evaluate.at_end):
            key, mode = "evaluate.num_visual_tokens", self.config.model.pooling_mode
            check_counts(evaluate.num_visual_tokens, processor.patch_grid, mode, key)
        with self._stage("prepare", "shards, their index and the plan"):
            self.data = open_data(self.config, processor, self.ranks, self.say, render_date)

    def build(self) -> None:
        """The model, under the engine, and what a step minimises."""
        config = self.config
        torch.manual_seed(config.train.seed)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        loading = functools.partial(parallel.sharded_loading, self.ds_config)
        with self._stage("build", f"the model, of {_part(config.model.vision)} and {_part(config.model.text)}"):
            model = build_model(config.model, config.budget, self.data.processor, dtype, loading, parallel.gathered)
        if self.layout.root.exists():  # a dry run has no folder
            record = self.layout.weights
            self.ranks.on_main(lambda: write_whole(record, json.dumps(weight_files(config.model), indent=1)))
        trains_rows = config.optimizer.train_image_tokens or (
            config.optimizer.text.train and not config.model.text_adapter.rank
        )
        if model.num_added_tokens and not trains_rows:
            self.say(
                f"note      {model.num_added_tokens} added tokens stay at the mean of the others: the embedding is not trained; "
                "optimizer.train_image_tokens=true trains them alone"
            )
        if config.train.compile == "blocks":
            self.say(f"compile   {compile_blocks(model)} blocks, at the first steps")
        groups = parameter_groups(model, config.optimizer)
        num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        self.rates = Schedule([group["lr"] for group in groups], config.train.num_steps, config.optimizer)
        with self._stage("engine", "gradients and optimizer, laid out over the ranks"):
            make, with_average = make_optimizer(groups, config.optimizer), config.train.ema_decay > 0
            self.engine = parallel.Engine(model, make, self.ds_config, self.ranks, with_average)
        projector, on_device = self.engine.model.projector, torch.empty(0, device=self.ranks.device)
        self.data.dataset.plan_of = projector.plan_maker(self.engine.model.patch_grid, on_device)
        if self.held_out:
            self.held_out.dataset.plan_of = self.data.dataset.plan_of
        failpoints.install_hooks(self.engine.model)
        failpoints.hit("init")
        self.say(
            f"model     {num_parameters / 1e6:.2f}M parameters, {self.precision} on {self.ranks.num_ranks} x "
            f"{self.ranks.device.type}, ZeRO stage {parallel.zero_stage(self.ds_config)}, {self.grad_accum_steps} micro-steps "
            "per step"
        )
        if config.model.probe:
            self.heartbeat.phase("probe", config.train.startup_timeout_s)
            with self._stage("probe", "whether the parts do in a pack what they do alone"):
                probe(self.engine.model, self.engine, self.ranks.device, config.data.pack_length)
        head = fused_loss_head(self.engine.model.language_model, config.train.fused_loss, self.ranks.device)
        weight = config.train.consistency
        terms = [Consistency(weight)] if weight else []
        self.objective = Objective(self.engine, self.data.processor.image_processor.normalised, head, terms)

    def resume(self) -> None:
        """The state that the run begins with, and who is told what it does."""
        self.state = RunState(
            engine=self.engine,
            recipe=self.recipe,
            folder=self.layout.checkpoints,
            heartbeat=self.heartbeat,
            settle_data=self.settle_data,
            record_event=self.record_event,
            name_of=self.data.dataset.name_of,
            say=self.say,
        )
        with self._stage("resume", "looking for a checkpoint, and loading it"):
            start(self.state, self.layout, self.config.train.resume_from, self._check)
        self.state.progress.data = self.data.identity["digest"]
        data, counts = self.config.data, self.config.budget.num_visual_tokens
        most_tiles = data.max_images_per_pack * data.packs_per_micro_batch * self.data.planner.budget.num_views
        shapes = shapes_of(counts, most_tiles)
        with self._stage("kernels", "their configurations for these shapes"):
            choices = settle(self.engine.model, shapes, self.ranks, self.state.progress.kernel_choices)
        self.state.progress.kernel_choices = choices
        self.ranks.on_main(lambda: write_whole(self.layout.data, json.dumps(self.data.identity, indent=1)))
        first = next(self.data.planner.steps_from(self.state.progress.data_position()))
        self.ranks.check_same_plan(first.digest(), "the first step to run")  # different packs could hang it
        self.observers = self._observers()

    def settle_data(self, progress: Progress) -> None:
        """See that a restored position is in the data that are there; where they are others, go to their next epoch.

        Raises:
            UserError: they are others, and that was not accepted.
        """
        now = self.data.identity
        if progress.data in ("", now["digest"]):
            return
        if not self._accepts_new_data:
            before = self._data_before
            if before is None or before["digest"] != progress.data:
                before = {**now, "digest": progress.data}
            check_same_data(before, now, f"run {self.layout.root}")
        progress.position = after_change(progress.data_position()).as_dict()
        progress.data = now["digest"]
        self.say(f"new data  accepted: going on at epoch {progress.position['epoch']}")

    def _observers(self) -> list[Observer]:
        config, data = self.config, self.config.data
        counts = self.engine.model.config.trained_num_visual_tokens
        observers: list[Observer] = [SampleTrace(self.layout, self.ranks)] if config.train.log_samples else []
        step = self.state.progress.step
        sinks = open_sinks(self.layout, self.recipe, step) if self.ranks.is_main else []
        observers.append(StepFigures(self.metrics, counts, self.objective.part_names))
        if self.held_out:
            observers.append(self._validation(self.held_out, sinks))
        pack_tokens = data.pack_length * data.packs_per_step // (self.ranks.num_ranks * self.grad_accum_steps)
        flops = model_flops(self.engine.model)
        observers.append(Telemetry(self.metrics, counts, pack_tokens, flops, self.engine, self.heartbeat))
        if self.ranks.is_main:
            observers.append(MetricLog(sinks, config.train.num_steps, step, self._peak_flops()))
        if config.train.ema_decay:
            observers.append(WeightAverage(self.engine, config.train.ema_decay))
        observers.append(BadSampleLog(self.layout, self.state, data.max_bad_fraction))
        if self.profiled and self.profiled.first <= step:
            self.say(
                f"note      --profile {self.profiled.first}-{self.profiled.last}: step {step} is done, nothing is profiled"
            )
        elif self.profiled and self.ranks.rank in self.profiled.ranks:
            folder, limit_s = self.layout.profile, config.train.startup_timeout_s
            observers.append(Profiler(self.profiled, folder, self.ranks.device, self.heartbeat, limit_s, self.say))
        observers.append(FirstStep(self.say))
        return observers

    def _validation(self, held_out: HeldOut, sinks: list[Sink]) -> Validation:
        def is_stopped() -> bool:
            return self.stop is not None and self.stop.is_set

        answers = None
        if self.config.evaluate.answers:
            model, limit_s = self.engine.model, self.config.train.startup_timeout_s
            processor = cast(TokenFlexProcessor, self.data.processor)
            answers = HeldOutAnswers(model, processor, held_out, self.config.evaluate, self.ranks, limit_s)
        return Validation(self.config, held_out, self.objective, self.state, sinks, is_stopped, answers=answers)

    def _peak_flops(self) -> float | None:
        """FLOPs per second that the job's devices could do, if they are all of this rank's kind."""
        device = self.ranks.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        peak = peak_flops(name, self.precision)
        return peak * self.ranks.num_ranks if peak else None

    def train(self, stop: StopRequest) -> bool:
        """Steps until the last one or a stop request; returns whether the run is complete.

        Raises:
            UserError: see `Trainer.train`.
        """
        self.stop = stop
        trainer = Trainer(
            settings=self.config.train,
            engine=self.engine,
            objective=self.objective,
            open_batches=self.open_batches,
            rates=self.rates,
            state=self.state,
            metrics=self.metrics,
            observers=self.observers,
            stop=stop,
        )
        try:
            is_complete = trainer.train()
        finally:
            for observer in self.observers:
                observer.close()
        for line in self.data.describe_dropped():
            self.say(line)
        self.heartbeat.phase("export", self.config.train.startup_timeout_s)
        return is_complete

    def open_batches(self, progress: Progress) -> Batches:
        """This rank's micro-batches from where the run stands, without the steps that it must not run again."""
        data, num_steps = self.config.data, self.config.train.num_steps
        excluded = {tuple(position) for position in progress.excluded_steps}
        steps = self.data.planner.steps_from(progress.data_position())
        steps = (step for step in steps if (step.position.epoch, step.position.step) not in excluded)
        plans = micro_batches(steps, self.ranks.rank, self.ranks.num_ranks, data.packs_per_micro_batch)
        plans = ahead(itertools.islice(plans, (num_steps - progress.step) * self.grad_accum_steps), PLANS_AHEAD)
        return batch_loader(self.data.dataset, plans, data.num_workers, self.ranks.device.type == "cuda")

    def export(self) -> None:
        """Write the model (or its average: `train.export_average`) as a folder that transformers loads."""
        with self.engine.averaged() if self.config.train.export_average else contextlib.nullcontext():
            state = self.engine.full_state()
        planner = self.data.planner
        data = f"{planner.epoch_size} samples per epoch from {len(planner.mixture.sources)} sources; name them here"
        card = {"name": self.config.name, "data": data}
        model, processor = self.engine.model, self.data.processor
        self.ranks.on_main(
            lambda: export_model(model, merged(state, self.config.model), processor, self.layout.model, card)
        )
        if self.config.train.export_adapter:
            whole = ("vision_tower", "language_model", "projector")
            trained = [m for m in whole if all(p.requires_grad for p in getattr(model, m).parameters())]
            self.ranks.on_main(lambda: save_adapters(state, self.config.model, trained, self.layout.adapter))

    def close(self) -> None:
        """Free what the engine holds; the process group stays."""
        self.engine.close()


def _part(part: str | dict) -> str:
    """A part of the recipe in a word or two."""
    return part if isinstance(part, str) else f"{part.get('model_type', 'a part')} from scratch"


def precision_of(wanted: str, device: torch.device) -> str:
    """`bf16` or `fp32`: what `train.precision` asks for on this device."""
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" else "fp32"


def prepare_folder(layout: RunLayout, recipe: RunConfig, fresh: bool) -> list[str]:
    """Make the run's folder ready, on one rank; returns a line for each setting that a run goes on with otherwise.

    Raises:
        UserError: its checkpoints (or those of `train.resume_from`) were made under settings that plan other data, or
            another model.
    """
    if fresh:
        for path in (layout.checkpoints, layout.model):
            if path.exists():
                shutil.rmtree(path)
        for path in [*layout.root.glob("*.jsonl"), layout.wandb_id]:
            path.unlink(missing_ok=True)
    plan, lines = plan_settings(recipe), []
    if saved := tags(layout.checkpoints):
        _check_plan(layout, plan, "set it back, choose another name=..., or begin anew with --fresh")
        lines = check_changes(_recipe_of(layout), recipe, f"run {layout.root}", step_of(saved[-1]) or 0)
    elif other := _layout_branched_from(recipe):
        _check_plan(other, plan, "a position in its data means nothing here: set it as there")
        check_branch(_recipe_of(other), recipe, f"run {other.root}")
    write_whole(layout.plan, json.dumps(plan, indent=1))
    save_config(recipe, layout.config)
    found = doctor.examine([layout.root, recipe.data.cache_dir], is_thorough=False)
    write_whole(layout.doctor, json.dumps(doctor.as_json(found), indent=1))
    return lines


def _layout_branched_from(recipe):
    """The run that `train.resume_from` names, or None."""
    return RunLayout(other_run(recipe.train.resume_from)[0].parent) if recipe.train.resume_from else None


def _recipe_of(layout):
    """The recipe that a run was last started with, as plain values.

    Raises:
        UserError: it is gone, so that nobody can tell whether the run still is the one that its checkpoints are of.
    """
    if not layout.config.exists():
        raise UserError(
            f"run {layout.root}: has checkpoints and no {layout.config.name}, which says what they were made with; put it back, "
            "choose another name=..., or begin anew with --fresh"
        )
    return yaml.safe_load(layout.config.read_text())


def _check_plan(layout, plan, mend):
    if not layout.plan.exists():
        return
    before = {**plan_settings(RunConfig()), **json.loads(layout.plan.read_text())}  # a key that is new had its default
    changed = sorted(key for key in {*plan, *before} if plan.get(key) != before.get(key))
    if changed == ["planner.version"]:
        mend = mend.replace("set it back", "take the release of tokenflex that made them")
    if changed:
        raise UserError(f"run {layout.root}: its checkpoints were made with another {', '.join(changed)}; {mend}")


def plan_settings(recipe: RunConfig) -> dict:
    """Everything that decides the plan: a position in the data means nothing under other settings."""
    apart = {"num_workers", "cache_dir", "shard_cache_gb", "evaluation", "packs_per_micro_batch"}
    data = {f"data.{key}": value for key, value in recipe.data.model_dump(mode="json").items() if key not in apart}
    budget = {f"budget.{key}": value for key, value in recipe.budget.model_dump(mode="json").items()}
    return {**data, **budget, "train.seed": recipe.train.seed, "planner.version": PLANNER_VERSION}
