"""Validation while training: the loss on held-out samples per task and count, teacher forced, every so many steps.

An observer: it runs between two steps, in the order of the plan on any number of ranks, and leaves weights, moments, generators
and the place in the data as they were.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..config import RunConfig
from ..data import batch_loader
from ..data.collate import PackedBatch
from ..data.held_out import HeldOut
from ..errors import UserError
from ..telemetry.bar import Bar
from ..telemetry.names import TEXT, VALIDATION
from ..telemetry.sinks import Sink
from .answers import HeldOutAnswers
from .objective import Objective
from .observers import Observer
from .progress import Progress, StepOutcome
from .state import RunState


def check_validation(config: RunConfig) -> None:
    """See that what the recipe says of validation can be.

    Raises:
        UserError: no held-out shards, counts that fit no pack, or best checkpoints that no validation will judge.
    """
    every, save_every = config.evaluate.every, config.train.save_every
    if not every:
        return
    if not config.data.evaluation:
        raise UserError(
            f"evaluate.every={every}: data.evaluation is empty; name held-out shards there, or set evaluate.every=0"
        )
    largest = max(config.evaluate.num_visual_tokens)
    if largest >= config.data.pack_length:
        raise UserError(
            f"evaluate.num_visual_tokens: {largest} visual tokens and their text fit no pack of data.pack_length="
            f"{config.data.pack_length}; leave the count out, or raise data.pack_length"
        )
    if config.train.keep_best and (not save_every or math.lcm(every, save_every) > config.train.num_steps):
        raise UserError(
            f"train.keep_best={config.train.keep_best}: no step is both saved (train.save_every={save_every}) and validated "
            f"(evaluate.every={every}); make one a multiple of the other"
        )


class Validation(Observer):
    """Every `evaluate.every` steps, and after the last one, the loss on held-out samples; the progress keeps the last.

    A line of `validation.jsonl` and every sink get `loss` (all samples at all counts), `loss_per_count`, `loss_per_task` {task:
    {count: loss}}, `accuracy` likewise where there are answers, `num_samples` and `seconds`. Losses are weighted as in training (`train.loss_weighting`). A run that is asked to
    stop leaves a validation unfinished, and does it when it goes on.

    Args:
        held_out: the samples; their data set plans pooling as the run's does.
        sinks: on rank 0, where whoever opened them rewinds and closes them; elsewhere none.
        is_stopped: () -> whether this rank has been asked to stop.
        answers: asks the model, or None.
    """

    def __init__(
        self,
        config: RunConfig,
        held_out: HeldOut,
        objective: Objective,
        state: RunState,
        sinks: Sequence[Sink],
        is_stopped: Callable[[], bool],
        *,
        answers: HeldOutAnswers | None = None,
    ):
        self.config, self.held_out, self.objective, self.state = config, held_out, objective, state
        self.sinks, self.is_stopped, self.answers = sinks, is_stopped, answers
        self.names = [*map(str, held_out.counts), TEXT]
        self.tasks = sorted(set(held_out.tasks.values()))
        self._is_first = True

    def on_batch(self, step: int, batch: PackedBatch) -> None:
        """A run that goes on where a validation was due and not done does it now."""
        if self._is_first and self._is_due(step):
            self.run(self.state.progress)
        self._is_first = False

    def on_step(self, outcome: StepOutcome) -> None:
        if self._is_due(self.state.progress.step):
            self.run(self.state.progress)

    def _is_due(self, step: int) -> bool:
        is_time = step % self.config.evaluate.every == 0 or step == self.config.train.num_steps
        return step > 0 and is_time and self.state.progress.validation.get("step") != step

    def run(self, progress: Progress) -> None:
        """Validate now; every rank calls it."""
        begin, engine = time.perf_counter(), self.state.engine
        engine.eval()
        with _about_any_count(engine.model):
            sums = self._sums()
            accuracy = self.answers(self.state.heartbeat) if self.answers and sums is not None else None
        engine.train()
        self.state.heartbeat.phase("observers")
        if sums is None:
            self.state.say("validate  left unfinished: the run is asked to stop, and does it when it goes on")
            return
        record = {"step": progress.step, **figures(sums, self.tasks, self.names)}
        record |= {"num_samples": len(self.held_out.tasks), "seconds": round(time.perf_counter() - begin, 3)}
        record |= {"accuracy": accuracy} if accuracy else {}
        progress.validation = {"step": progress.step, "loss": record["loss"]}
        for sink in self.sinks:
            sink.write(record, VALIDATION)
        counts = " ".join(f"{name}:{loss:.3f}" for name, loss in record["loss_per_count"].items())
        right = f" | answers {100 * _mean(accuracy):.1f} %" if accuracy else ""
        self.state.say(f"validate  step {progress.step}: loss {record['loss']:.4f} | per count {counts}{right}")

    def _sums(self) -> np.ndarray | None:
        """[tasks, counts, 2] sums of weighted losses and of weights over all ranks; None where the run is to stop."""
        ranks, data = self.state.ranks, self.config.data
        sums = np.zeros((len(self.tasks), len(self.names), 2))
        plans = self.held_out.plans(ranks.rank, ranks.num_ranks)
        batches = batch_loader(self.held_out.dataset, plans, data.num_workers, ranks.device.type == "cuda")
        bar = Bar(self.held_out.num_plans(ranks.num_ranks), "validate", "packs", self.state.say, ranks.is_main)
        try:
            for plan, batch in batches:
                self.state.heartbeat.phase("validate", self.config.train.startup_timeout_s)
                (must_stop,) = ranks.all_reduce_max([float(self.is_stopped())])
                if must_stop:
                    return None
                self._add(sums, plan.sample_ids, batch)
                bar.update()
        finally:
            batches.close()
            bar.close()
        return ranks.all_reduce_sum(torch.from_numpy(sums).flatten()).cpu().numpy().reshape(sums.shape)

    @torch.no_grad()
    def _add(self, sums: np.ndarray, sample_ids: np.ndarray, batch: PackedBatch) -> None:
        """Run a pack and add its losses to `sums`; every rank has as many packs, some perhaps empty."""
        sample_of_L, weights = batch.learned_views.numpy(), batch.weights.double()
        _, losses_L = self.objective.token_losses(batch.to(self.state.engine.device))
        if not len(sample_of_L):
            return
        columns = [self.names.index(str(count) if count else TEXT) for count in batch.counts.tolist()]
        rows = [self.tasks.index(self.held_out.tasks[int(sample)]) for sample in sample_ids]
        values = torch.stack([losses_L.double().cpu() * weights, weights], dim=-1).numpy()
        np.add.at(sums, (np.array(rows)[sample_of_L], np.array(columns)[sample_of_L]), values)


@contextlib.contextmanager
def _about_any_count(model: PreTrainedModel) -> Iterator[None]:
    """Within this context the model does not mention that a count was not trained: that is the point of trying it."""
    logger = logging.getLogger(type(model).__module__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _mean(accuracy: dict[str, dict[str, float]]) -> float:
    """Over tasks and counts alike."""
    shares = [share for row in accuracy.values() for share in row.values()]
    return sum(shares) / len(shares)


def figures(sums: np.ndarray, tasks: Sequence[str], names: Sequence[str]) -> dict:
    """Losses of a validation from [tasks, counts, 2] sums: over all, per count, per task and count; what has no sample is left
    out."""
    per_count, whole = sums.sum(0), sums.sum((0, 1))
    return {
        "loss": float(whole[0] / whole[1]),
        "loss_per_count": {name: float(total / weight) for name, (total, weight) in zip(names, per_count) if weight},
        "loss_per_task": {
            task: {name: float(total / weight) for name, (total, weight) in zip(names, row) if weight}
            for task, row in zip(tasks, sums)
        },
    }
