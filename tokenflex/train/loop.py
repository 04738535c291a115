"""The training loop, on one screen: fetch, forward, backward, step, agree, log, save."""

import math
import signal
from collections import Counter
from dataclasses import dataclass

import torch

from .. import failpoints
from ..layout import STOP_SIGNALS
from .loss import fused_loss_head
from .meter import count_images
from .optimizer import rate_factor
from .step import batch_loss


class StopRequest:
    """Set by SIGINT, SIGTERM and SIGUSR1 (SLURM's warning before the time limit); looked at once per step, so a stop always
    falls between two steps."""

    def __init__(self):
        self.is_set = False

    def __enter__(self):
        self._previous = {name: signal.signal(name, self._set) for name in STOP_SIGNALS}
        return self

    def __exit__(self, *exception):
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def _set(self, number, frame):
        self.is_set = True


def train(state, open_batches, normalise, peak_rates, config, meter, stop, bad_samples):
    """Run steps until `config.train.num_steps` or a stop request; returns whether the run is complete.

    Args:
        state: `RunState`: engine, progress, checkpoints.
        open_batches: (progress) -> iterator of (MicroBatchPlan, PackedBatch) of this rank, from there on.
        normalise: image bytes -> pixel values.
        peak_rates: peak learning rate per optimizer group.
        stop: `StopRequest`.
        bad_samples: `BadSampleLog`.
    """
    engine, progress, settings = state.engine, state.progress, config.train
    engine.train()
    fused_head = fused_loss_head(engine.model.language_model, settings.fused_loss, engine.device)
    interval, batches = Interval(engine.device), open_batches(progress)
    try:
        while progress["step"] < settings.num_steps:
            rates = [peak * rate_factor(progress["step"], settings.num_steps, config.optimizer) for peak in peak_rates]
            state.heart.step(progress["step"])
            done = run_step(state, batches, normalise, rates, interval, bad_samples, fused_head)
            meter.samples(progress["step"], done.position, done.sample_ids)
            is_bad = bool(done.problem) and state.skip(
                done.position, done.problem, meter.names(done.sample_ids, state.ranks)
            )
            progress["step"] += 1
            progress["position"] = done.next_position.as_dict()
            if not done.problem:
                state.accept()
            is_done = progress["step"] == settings.num_steps
            if progress["step"] % settings.log_every == 0 or is_done:
                state.heart.phase("log")
                record = interval.read(engine)
                meter.log(
                    {
                        "step": progress["step"],
                        **record,
                        "num_skipped_steps": progress["num_skipped"],
                        "learning_rates": rates,
                    }
                )
                bad_samples.count(engine.sum_over_ranks)
                bad_samples.check()
                interval = Interval(engine.device)
            meter.advance()
            state.heart.phase("agree to go on")
            if failpoints.skips("agree"):
                continue
            plan = int(done.digest[:13], 16)  # 52 bits: exact as a float, of which the agreement gives the highest
            highest, lowest, is_stopped, *flags = state.ranks.agree([plan, -plan, float(stop.is_set), *state.flags()])
            if highest != -lowest:
                state.ranks.check_same_plan(done.digest, f"step {progress['step']}")
            state.advance(*flags)
            if is_bad:
                state.roll_back()
                meter.rewind(progress["step"])
                bad_samples.forget()
                batches.close()
                interval, batches = Interval(engine.device), open_batches(progress)
            elif is_done or is_stopped or (settings.save_every and progress["step"] % settings.save_every == 0):
                bad_samples.count(engine.sum_over_ranks)
                state.save()
            if is_stopped and not is_done:
                break
        is_complete = progress["step"] == settings.num_steps
        state.finish(must_be_saved=not is_complete)
    finally:
        batches.close()
    return is_complete


@dataclass(frozen=True)
class StepDone:
    """One optimizer step on this rank: where it stands in the data, its samples here, why it was skipped, if it was, and the
    digest of its plan."""

    position: object
    next_position: object
    sample_ids: list
    problem: str
    digest: str


def run_step(state, batches, normalise, rates, interval, bad_samples, fused_head=None):
    """All micro-steps of one optimizer step; the weights move only if the guard finds nothing wrong with it."""
    engine, guard, enter, step = state.engine, state.guard, state.heart.phase, state.progress["step"]
    loss_sum, ids, micro = torch.zeros((), dtype=torch.float64, device=engine.device), [], 0
    problem = ""

    def judge(grad_norm):
        nonlocal problem
        problem = guard.judge(loss_value, grad_norm)
        return problem

    while True:
        failpoints.at(step, micro)
        enter("fetch")
        failpoints.hit("fetch")
        plan, batch = next(batches)
        bad_samples.add(batch, step)
        batch = batch.to(engine.device)
        enter("forward")
        failpoints.hit("forward")
        loss = failpoints.corrupt("loss", batch_loss(engine, batch, normalise, fused_head))
        enter("backward")
        engine.backward(loss)
        loss_sum += loss.detach()
        ids += batch.sample_ids.tolist()
        interval.add(batch)
        if plan.is_last:
            loss_value = engine.sum_over_ranks(loss_sum.view(1)).item()
            failpoints.hit("before-step")
            state.before_update()
            enter("step")
            engine.step(rates, judge)
            failpoints.hit("after-step")
            interval.add_step(loss_value, bool(problem))
            return StepDone(plan.position, plan.next_position, ids, problem, plan.digest)
        engine.step(rates)
        micro += 1


class Interval:
    """Sums between two log lines; skipped steps count for nothing in the loss."""

    def __init__(self, device):
        self.loss = 0.0
        self.images = Counter()
        self.num_tokens = self.num_visual_tokens = self.num_samples = self.num_bad = self.num_steps = 0

    def add(self, batch):
        self.images += count_images(batch)
        self.num_tokens += batch.input_ids.shape[1]
        self.num_visual_tokens += batch.visual_positions.shape[0]
        self.num_samples += batch.sample_ids.shape[0]
        self.num_bad += len(batch.skipped)

    def add_step(self, loss, is_skipped):
        if not is_skipped:
            self.loss += loss
            self.num_steps += 1

    def read(self, engine):
        """Figures over all ranks; every rank must call it. Loss and norm are None where every step was skipped."""
        counts = sorted(engine.model.config.trained_num_visual_tokens)
        sums = [self.num_tokens, self.num_visual_tokens, self.num_samples, self.num_bad]
        sums = [*sums, *(self.images[count] for count in counts)]
        sums = engine.sum_over_ranks(torch.tensor(sums, dtype=torch.float64)).tolist()
        norm = engine.grad_norm()
        return {
            "loss": self.loss / self.num_steps if self.num_steps else None,
            "grad_norm": norm if math.isfinite(norm) else None,
            "num_tokens": int(sums[0]),
            "num_visual_tokens": int(sums[1]),
            "num_samples": int(sums[2]),
            "num_bad_samples": int(sums[3]),
            "images_per_count": {str(count): int(number) for count, number in zip(counts, sums[4:])},
        }


def install_faults(model):
    """Points inside forward and backward, where a test has asked for faults; else nothing is hooked."""
    if not failpoints.is_active():
        return

    def backward_hook(module, grad_inputs, grad_outputs):
        failpoints.hit("mid-backward")
        return tuple(None if grad is None else failpoints.corrupt("gradient", grad) for grad in grad_inputs)

    model.projector.register_full_backward_hook(backward_hook)
    model.projector.register_forward_hook(lambda module, inputs, output: failpoints.corrupt("activation", output))
