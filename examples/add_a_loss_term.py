#!/usr/bin/env python3
"""Train with a loss term, a metric and an observer of your own, without touching the trainer.

    python examples/add_a_loss_term.py --config configs/quickstart.yaml train.num_steps=20

The term is a z-loss: the squared logarithm of each softmax' denominator, which keeps logits from drifting (as PaLM and
others use it). The observer tells when the loss has halved. Both are a few lines, handed over between the stages of a run.
"""

import sys

import torch

from tokenflex import parallel
from tokenflex.cli.launching import entry_point
from tokenflex.cli.options import launch_parser
from tokenflex.config import load_config
from tokenflex.corpus import resolve_embedded
from tokenflex.layout import DONE, REQUEUE, RunLayout
from tokenflex.train.guarding import SoleWriter, watched
from tokenflex.train.objective import Objective
from tokenflex.train.observers import Observer
from tokenflex.train.run import Run
from tokenflex.train.trainer import StopRequest


class ZLoss:
    """`weight` times the mean squared log-denominator of the learned tokens' softmax."""

    name = "z_loss"
    needs_logits = True

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, outputs, batch):
        log_z = outputs.logits.squeeze(0).float().logsumexp(-1)
        return self.weight * (batch.weights * log_z.square()).sum() / max(batch.total_weight, 1e-30)


class Halved(Observer):
    """Says once when a step's loss is half of the first one's; logs the loss' distance to the first as a metric."""

    def __init__(self, metrics, say):
        self.metrics, self.say, self.first = metrics, say, None
        metrics.declare("loss_gained", "same")

    def on_step(self, outcome):
        self.first = outcome.loss if self.first is None else self.first
        self.metrics.add("loss_gained", self.first - outcome.loss)
        if self.first > 0 and outcome.loss < self.first / 2:
            self.say(f"halved    at step {outcome.step}")
            self.first = 0.0


def main(arguments, say):
    recipe = load_config(arguments.config, arguments.overrides)
    parallel.quiet_libraries()
    launch = parallel.join()
    say.is_main = launch.rank == 0
    config = resolve_embedded(recipe, say)
    ranks = parallel.join_ranks(launch)
    ds_config = {"zero_optimization": {"stage": 2}}
    layout = RunLayout.of(config)
    with StopRequest() as stop, SoleWriter(layout, ranks), watched(layout, config.train, ranks) as heartbeat:
        run = Run(recipe, config, ds_config, ranks, heartbeat, say)
        run.prepare()
        run.build()
        normalise = run.data.processor.image_processor.normalised
        run.objective = Objective(run.engine, normalise, terms=[ZLoss(1e-3)])
        run.resume()
        run.observers.insert(0, Halved(run.metrics, say))
        is_complete = run.train(stop)
        run.close()
    return DONE if is_complete else REQUEUE


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(entry_point(main, launch_parser(__doc__).parse_intermixed_args(sys.argv[1:]), is_job=True))
