"""The training loop, on one screen: fetch, forward, backward, step, log, save."""

import signal
from collections import Counter

import torch

from ..checkpoint import save_checkpoint
from .loss import fused_loss_head
from .meter import count_images
from .optimizer import rate_factor
from .step import batch_loss


class StopRequest:
    """Set by SIGINT and SIGTERM; looked at once per step, so a stop always falls between two steps."""

    def __init__(self):
        self.is_set = False

    def __enter__(self):
        self._previous = {name: signal.signal(name, self._set) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def _set(self, number, frame):
        self.is_set = True


def train(engine, batches, normalise, peak_rates, config, progress, checkpoints, meter):
    """Run steps until `config.train.num_steps` or a stop request; returns whether the run is complete.

    Args:
        engine: `tokenflex.parallel.Engine`.
        batches: iterator of (MicroBatchPlan, PackedBatch) of this rank.
        normalise: image bytes -> pixel values.
        peak_rates: peak learning rate per optimizer group.
        progress: dict with `step` and `position`, updated as the run goes; what a checkpoint saves.
        checkpoints: folder of the run's checkpoints.
    """
    settings = config.train
    engine.train()
    fused_head = fused_loss_head(engine.model.language_model, settings.fused_loss, engine.device)
    interval = Interval(engine.device)
    with StopRequest() as stop:
        while progress["step"] < settings.num_steps:
            rates = [peak * rate_factor(progress["step"], settings.num_steps, config.optimizer) for peak in peak_rates]
            position = run_step(engine, batches, normalise, rates, interval, fused_head)
            progress["step"] += 1
            progress["position"] = {"epoch": position.epoch, "step": position.step + 1}
            is_done = progress["step"] == settings.num_steps
            if progress["step"] % settings.log_every == 0 or is_done:
                meter.log({"step": progress["step"], **interval.read(engine), "learning_rates": rates})
                interval = Interval(engine.device)
            meter.advance()
            is_stopped = engine.any_rank(stop.is_set)
            if is_done or is_stopped or (settings.save_every and progress["step"] % settings.save_every == 0):
                save_checkpoint(engine, checkpoints, progress, settings.keep_checkpoints)
            if is_stopped and not is_done:
                return False
    return True


def run_step(engine, batches, normalise, rates, interval, fused_head=None):
    """All micro-steps of one optimizer step; returns its position in the data."""
    while True:
        plan, batch = next(batches)
        batch = batch.to(engine.device)
        loss = batch_loss(engine, batch, normalise, fused_head)
        engine.backward(loss)
        engine.step(rates)
        interval.add(loss.detach(), batch)
        if plan.is_last:
            interval.num_steps += 1
            return plan.position


class Interval:
    """Sums between two log lines. The loss stays on the device, so that no step waits for it."""

    def __init__(self, device):
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.images = Counter()
        self.num_tokens = self.num_visual_tokens = self.num_samples = self.num_steps = 0

    def add(self, loss, batch):
        self.loss += loss
        self.images += count_images(batch)
        self.num_tokens += batch.input_ids.shape[1]
        self.num_visual_tokens += batch.visual_positions.shape[0]
        self.num_samples += batch.sample_ids.shape[0]

    def read(self, engine):
        """Figures over all ranks; every rank must call it."""
        counts = sorted(engine.model.config.trained_num_visual_tokens)
        sums = [self.num_tokens, self.num_visual_tokens, self.num_samples, *(self.images[count] for count in counts)]
        sums = engine.sum_over_ranks(torch.tensor([self.loss.item(), *sums], dtype=torch.float64)).tolist()
        return {
            "loss": sums[0] / self.num_steps,
            "grad_norm": engine.grad_norm(),
            "num_tokens": int(sums[1]),
            "num_visual_tokens": int(sums[2]),
            "num_samples": int(sums[3]),
            "images_per_count": {str(count): int(number) for count, number in zip(counts, sums[4:])},
            "num_skipped_steps": engine.num_skipped_steps,
        }
