"""The training loop, on one screen: fetch, forward, backward, step, log, agree, save."""

import math
import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch

from .. import failpoints
from ..config import TrainConfig
from ..data.collate import PackedBatch
from ..data.loader import MicroBatchPlan
from ..layout import STOP_SIGNALS
from ..parallel import Engine
from .metrics import Metrics
from .objective import Objective
from .observers import Observer
from .progress import Progress, StepOutcome
from .state import RunState

Batches = Generator[tuple[MicroBatchPlan, PackedBatch], None, None]


class StopRequest:
    """Set by SIGINT, SIGTERM and SIGUSR1 (SLURM's warning before the time limit); looked at once per step, so a stop always
    falls between two steps."""

    def __init__(self) -> None:
        self.is_set = False

    def __enter__(self) -> "StopRequest":
        self._previous = {name: signal.signal(name, self._set) for name in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def _set(self, number, frame):
        self.is_set = True


@dataclass(kw_only=True)
class Trainer:
    """The parts of a run that a step needs, and the loop over its steps. Every rank has one.

    open_batches: (progress) -> this rank's micro-batches from there on. rates: (step) -> one
    learning rate per optimizer group. observers: told what happens, in this order.
    """

    settings: TrainConfig
    engine: Engine
    objective: Objective
    open_batches: Callable[[Progress], Batches]
    rates: Callable[[int], list[float]]
    state: RunState
    metrics: Metrics
    observers: Sequence[Observer]
    stop: StopRequest

    def train(self) -> bool:
        """Run steps until `num_steps` or a stop request; returns whether the run is complete.

        Raises:
            UserError: the ranks' plans come apart, too many bad samples, saves that fail, or a run that diverges.
        """
        state, settings = self.state, self.settings
        self.engine.train()
        batches = self.open_batches(state.progress)
        try:
            while state.progress.step < settings.num_steps:
                outcome = self.run_step(batches)
                must_go_back = state.record(outcome)
                self._tell("on_step", outcome)
                step, is_last = state.progress.step, state.progress.step == settings.num_steps
                if step % settings.log_every == 0 or is_last:
                    self._log(outcome)
                is_stopped = self._agree(outcome)
                if must_go_back:
                    state.roll_back()
                    self._tell("on_rewind", state.progress.step)
                    self.metrics.clear()
                    batches.close()
                    batches = self.open_batches(state.progress)
                elif is_last or is_stopped or (settings.save_every and step % settings.save_every == 0):
                    self._tell("on_save", state.progress)
                    state.save()
                if is_stopped and not is_last:
                    break
            is_complete = state.progress.step == settings.num_steps
            state.finish(must_be_saved=not is_complete)
        finally:
            batches.close()
        return is_complete

    def run_step(self, batches: Batches) -> StepOutcome:
        """All micro-steps of one optimizer step; the weights move only if the spike filter finds nothing wrong with it."""
        engine, state, step = self.engine, self.state, self.state.progress.step
        enter = state.heartbeat.phase
        state.heartbeat.step(step)
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        parts: dict[str, torch.Tensor] = {}
        ids, micro, rates = [], 0, self.rates(step)
        while True:
            failpoints.at(step, micro)
            enter("fetch")
            failpoints.hit("fetch")
            plan, batch = next(batches)
            self._tell("on_batch", step, batch)
            ids += batch.sample_ids.tolist()  # while they are on the host: reading them back would wait for the device
            batch = batch.to(engine.device)
            enter("forward")
            failpoints.hit("forward")
            loss = self.objective(batch)
            self._tell("on_loss", batch, loss)
            share = failpoints.corrupt("loss", loss.total)
            enter("backward")
            engine.backward(share)
            total += share.detach()
            parts = {name: parts.get(name, 0.0) + part for name, part in loss.parts.items()}
            if plan.is_last:
                break
            engine.step(rates)
            micro += 1
        enter("wait for the loss")
        loss = engine.ranks.all_reduce_sum(total.view(1))
        failpoints.hit("before-step")
        state.before_update()
        enter("wait for the loss")  # it is read with the gradient norm, once both are known
        update = engine.step(rates, self._judge, [loss])
        failpoints.hit("after-step")
        return StepOutcome(
            step=step,
            position=plan.position,
            next_position=plan.next_position,
            sample_ids=ids,
            loss=update.beside[0],
            loss_parts=parts,
            grad_norm=update.grad_norm,
            problem=update.vetoed,
            digest=plan.digest,
        )

    def _judge(self, grad_norm, loss):
        """Why the step must be skipped; asked when the figures are there and the update is about to be made."""
        self.state.heartbeat.phase("step")
        return self.state.spike_filter.judge(loss, grad_norm)

    def _log(self, outcome):
        self.state.heartbeat.phase("log")
        progress = self.state.progress
        record = {"step": progress.step, **self.metrics.read(self.engine.ranks)}
        if record.get("grad_norm") is not None and not math.isfinite(record["grad_norm"]):
            record["grad_norm"] = None
        rates = self.rates(outcome.step)
        self._tell("on_log", {**record, "num_skipped_steps": progress.num_skipped, "learning_rates": rates})

    def _agree(self, outcome):
        """What all ranks must know before the next step: that they planned the same, whether to stop, how a save stands."""
        self.state.heartbeat.phase("agree to go on")
        plan = int(outcome.digest[:13], 16)  # 52 bits: exact as a float, of which the agreement gives the highest
        ours = [plan, -plan, float(self.stop.is_set), *self.state.flags()]
        highest, lowest, is_stopped, *flags = self.engine.ranks.all_reduce_max(ours)
        if highest != -lowest:
            self.engine.ranks.check_same_plan(outcome.digest, f"step {self.state.progress.step}")
        self.state.advance(*flags)
        return bool(is_stopped)

    def _tell(self, what, *about):
        for observer in self.observers:
            getattr(observer, what)(*about)
