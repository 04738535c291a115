"""The fullest packs that a run's plan has, through one step each on the real parts: does it fit, and is it what was estimated?

A stage of a `Run` beside the loop: data and model are made as for training, then nothing is written and nothing goes on.
"""

import heapq
import itertools
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..config import RunConfig
from ..data.collate import PackedBatch
from ..data.loader import MicroBatchPlan
from ..errors import UserError
from ..model.build import recompute_activations, shaped_model
from ..parallel import Heartbeat, Ranks, resolve_ds_config, zero_stage
from ..plan import Pack, Planner, Position
from ..train.loss import fused_loss_head
from ..train.optimizer import parameter_groups
from ..train.run import Run
from .memory import Memory, ModelSizes, stage_memory
from .trace import PackShape, activation_bytes, logits_bytes
from .workload import MAX_PACKS, packs_of, windows

WORST = {"most tokens": "tokens", "most tiles": "tiles", "most visual tokens": "visual_tokens"}
"""What packs are the fullest in, and the column of `Packs` that tells."""
MAX_LISTED = 16


class Unwatched(Heartbeat):
    """A heartbeat that nobody listens to: a dry run has no folder for watchdogs to meet in."""

    def __init__(self) -> None:
        pass

    def phase(self, name: str, limit_s: float | None = None) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A micro-batch that was run. peak: bytes of each rank, beyond what the process had before the model. loss: of the step."""

    name: str
    shape: PackShape
    loss: float
    peak: list[float]
    estimate: Memory


def dry_run(
    recipe: RunConfig, config: RunConfig, ds_config: dict, ranks: Ranks, say: Callable[[str], None] = print
) -> str:
    """Try a run's fullest packs; every rank calls it. Returns a table: what each took at most, beside the estimate.

    Nothing is written but indexes that are missing, as by any reader of the shards.

    Args: see `train.run.run_training`.

    Raises:
        UserError: whatever a run would raise before its first step, or a pack that does not fit the GPU.
    """
    run = Run(recipe, config, ds_config, ranks, Unwatched(), say)
    run.open_data()
    accumulated = min(
        2, run.grad_accum_steps
    )  # gradients are there while the second micro-step runs, as in any later one
    run.ds_config = resolve_ds_config(ds_config, run.precision, accumulated, config.optimizer.max_grad_norm)
    plans = list(
        worst_micro_batches(run.data.planner, config.data.packs_per_step // ranks.num_ranks // run.grad_accum_steps)
    )
    meter = Meter(ranks)
    run.build()
    run.engine.train()
    tried = []
    for name, plan in [plans[0], *plans]:  # the first step makes the moments
        batch = run.data.dataset.batch(plan)
        peak, loss = _step(run, meter, name, batch, accumulated)
        tried.append((name, shape_of(batch), loss, ranks.all_gather(peak)))
    run.close()
    results = [
        Tried(name=name, shape=shape, loss=loss, peak=peaks, estimate=estimated(run, shape))
        for name, shape, loss, peaks in tried[1:]
    ]
    return describe(results, run)


def _step(run: Run, meter: "Meter", name: str, batch: PackedBatch, accumulated: int) -> tuple[float, float]:
    """(peak bytes of this rank, loss) of one step of `accumulated` micro-steps with the same batch."""
    meter.reset()
    total = torch.zeros((), dtype=torch.float64)
    try:
        weight = (
            float(batch.weights.sum()) * accumulated * run.ranks.num_ranks
        )  # of all that is run: the loss is a mean
        on_device = replace(batch, total_weight=weight).to(run.engine.device)
        for micro in range(accumulated):
            loss = run.objective(on_device)
            run.engine.backward(loss.total)
            total += loss.total.detach().cpu()
            is_last = micro + 1 == accumulated
            run.engine.step(run.rates(0), (lambda norm: "") if is_last else None)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"dry run, pack with {name}: does not fit ({str(error).splitlines()[0]}); set model.gradient_checkpointing=true, lower "
            "data.pack_length or data.max_images_per_pack, or take more GPUs or a higher ZeRO stage"
        ) from None
    return meter.peak(), float(run.ranks.all_reduce_sum(total.float().view(1)).item())


class Meter:
    """Memory of this rank: of its GPU, or of its process beyond what it had when this was made."""

    def __init__(self, ranks: Ranks):
        self.device = ranks.device
        self.before = 0.0 if self.device.type == "cuda" else resident("VmRSS")

    def reset(self) -> None:
        """Forget the peak so far, where the system can."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif (switch := Path("/proc/self/clear_refs")).exists():
            try:
                switch.write_text("5")
            except OSError:
                return  # not allowed here: the peak is then that of the whole process

    def peak(self) -> float:
        """The most bytes since the last reset."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return resident("VmHWM") - self.before


def resident(what: str) -> float:
    """Bytes of this process in memory: now (`VmRSS`) or at their most (`VmHWM`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return float(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def worst_micro_batches(planner: Planner, packs_at_once: int) -> Iterator[tuple[str, MicroBatchPlan]]:
    """(what it has most of, plan) of the micro-batches that no other of the plan exceeds in tokens, tiles or visual tokens.

    The first epoch's, of `MAX_PACKS` packs at most.
    """
    fullest: dict[str, list[tuple[float, int, Pack]]] = {name: [] for name in WORST}
    number = itertools.count()
    for window in windows(planner, MAX_PACKS):
        columns, samples = packs_of(window, planner.budget), window.samples
        bounds = np.searchsorted(window.pack, np.arange(window.num_packs + 1))
        for name, column in WORST.items():
            values = getattr(columns, column)
            for place in np.argsort(-values, kind="stable")[:packs_at_once]:
                which = slice(bounds[place], bounds[place + 1])
                pack = Pack(samples.id[which], samples.count[which], samples.num_messages[which])
                heapq.heappush(fullest[name], (float(values[place]), -next(number), pack))
                fullest[name] = heapq.nlargest(packs_at_once, fullest[name])
    for name, entries in fullest.items():
        packs = [pack for _, _, pack in entries]
        columns_of = [
            np.concatenate([getattr(pack, part) for pack in packs]) for part in ("sample_ids", "counts", "num_messages")
        ]
        ids, counts, num_messages = columns_of
        yield (
            name,
            MicroBatchPlan(
                position=Position(),
                is_last=True,
                sample_ids=ids,
                counts=counts,
                total_weight=1.0,
                num_messages=num_messages,
            ),
        )


def shape_of(batch: PackedBatch) -> PackShape:
    """What of a batch decides its memory."""
    tiles = 0 if batch.is_dummy_image else len(batch.images)
    # a pack of several counts is estimated at its largest, one of several views at all that a tile gives
    count = max(batch.tile_counts) if batch.tile_index is None else -(-len(batch.visual_positions) // len(batch.images))
    lengths = tuple(batch.cu_seq_lens.diff().tolist())
    return PackShape(lengths=lengths, tiles=tiles, count=count, learned=len(batch.targets))


def estimated(run: Run, shape: PackShape) -> Memory:
    """The estimate for a micro-batch of this shape on this run's ranks."""
    config = run.config
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    model = shaped_model(config.model, config.budget, dtype).train()
    parameter_groups(model, config.optimizer)
    if config.model.gradient_checkpointing:
        recompute_activations(model)
    is_fused = fused_loss_head(model.language_model, config.train.fused_loss, run.ranks.device) is not None
    held = {
        "activations": float(activation_bytes(model, shape)),
        "logits": float(logits_bytes(model, shape.learned, is_fused)),
    }
    sizes, stage = ModelSizes.of(model, run.ds_config), zero_stage(run.ds_config)
    has_average = config.train.ema_decay > 0
    memory = stage_memory(sizes, run.ds_config, stage, run.ranks.num_ranks, held, with_average=has_average)
    if run.ranks.device.type == "cpu":  # pages of a bucket that nothing is written to are not there
        memory = replace(memory, buffers=min(memory.buffers, float(sizes.itemsize * sizes.trained)))
    return memory


def describe(tried: list[Tried], run: Run) -> str:
    """The table of what was tried."""
    what = "GPU memory" if run.ranks.device.type == "cuda" else "memory of the process beyond its libraries"
    lines = [
        f"dry run   the plan's fullest packs, a step each, on {run.ranks.num_ranks} ranks: nothing was written",
        f"{'pack with':<20s}{'tokens':>9s}{'tiles':>7s}{'at':>6s}{'learned':>9s}{'loss':>9s}{'peak, GB':>10s}{'estimate':>10s}",
    ]
    for item in tried:
        shape, peak = item.shape, max(item.peak) / 1e9
        lines.append(
            f"{item.name:<20s}{shape.tokens:>9,}{shape.tiles:>7}{shape.count:>6}{shape.learned:>9,}{item.loss:>9.3f}{peak:>10.3f}"
            f"{item.estimate.total / 1e9:>10.3f}"
        )
    peaks = np.max([item.peak for item in tried], axis=0) / 1e9
    worst = int(peaks.argmax())
    shown = ", ".join(f"{rank}: {peak:.3f}" for rank, peak in enumerate(peaks[:MAX_LISTED]))
    lines.append(f"per rank  {shown}{' ...' if len(peaks) > MAX_LISTED else ''} GB; the most on rank {worst} ({what})")
    return "\n".join(lines)
