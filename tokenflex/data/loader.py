"""Planned steps -> packed batches of one rank, read and decoded by worker processes in an order that no worker changes."""

import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .. import failpoints
from ..errors import UserError
from ..layout import STOP_SIGNALS
from ..plan import Lengths, Mixture, Position, Source, StepPlan
from .clips import with_frames
from .collate import PackedBatch, PreparedSample, collate, prepare_views, substitute
from .index import Index
from .problems import BadSample, Limits
from .processor import Processor
from .sample import Sample, first_messages, parse_sample
from .shards import Shard


@dataclass(frozen=True)
class MicroBatchPlan:
    """What one rank does in one micro-step: sample ids, their visual-token counts, and where this stands in the run.

    position: of its step. next_position: where a run goes on after the step. num_messages [S]: how much of each conversation
    is used; 0 is all of it. digest: of the step's plan over all ranks, to be compared between them.
    """

    position: Position
    is_last: bool
    sample_ids: np.ndarray
    counts: np.ndarray
    total_weight: float
    next_position: Position = Position()
    num_messages: np.ndarray | None = None
    digest: str = "0"


def micro_batches(
    steps: Iterable[StepPlan], rank: int, num_ranks: int, packs_per_micro_batch: int
) -> Iterator[MicroBatchPlan]:
    """A rank's share of each step: yields `MicroBatchPlan`s, `is_last` on the one that completes the optimizer step.

    Micro-step m takes packs [m * R * k, (m + 1) * R * k) of the step, rank r the k packs from r * k on: so the step holds
    the same packs on any number of ranks R.
    """
    for step in steps:
        share, digest = len(step.packs) // num_ranks, step.digest()
        per_micro = min(packs_per_micro_batch, share)
        for first in range(0, share, per_micro):
            begin = first * num_ranks + rank * per_micro
            packs = step.packs[begin : begin + per_micro]
            yield MicroBatchPlan(
                position=step.position,
                is_last=first + per_micro == share,
                sample_ids=np.concatenate([pack.sample_ids for pack in packs]),
                counts=np.concatenate([pack.counts for pack in packs]),
                total_weight=step.total_weight,
                next_position=step.next_position,
                num_messages=np.concatenate([pack.num_messages for pack in packs]),
                digest=digest,
            )


def num_micro_steps(packs_per_step: int, num_ranks: int, packs_per_micro_batch: int) -> int:
    """Micro-steps per optimizer step.

    Raises:
        UserError: the ranks do not divide the packs of a step, or the packs of a micro-batch do not divide a rank's share.
    """
    share, rest = divmod(packs_per_step, num_ranks)
    if rest:
        raise UserError(
            f"data.packs_per_step={packs_per_step} does not divide over {num_ranks} ranks; "
            f"set it to a multiple of {num_ranks} or start with another number of ranks"
        )
    per_micro = min(packs_per_micro_batch, share)
    if share % per_micro:
        raise UserError(
            f"data.packs_per_micro_batch={packs_per_micro_batch} does not divide the {share} packs that each of {num_ranks} "
            f"ranks has per step; choose a divisor of {share}"
        )
    return share // per_micro


def one_view(count: int) -> tuple[int, ...]:
    """The counts that a sample is seen at where it has one."""
    return (count,)


class PackDataset(Dataset):
    """`dataset[MicroBatchPlan]` -> (plan, PackedBatch or the UserError that came in its place).

    Opens shards where it runs and keeps the last few open. An error travels as a value: raised in a worker process it
    would arrive wrapped in the worker's traceback.
    """

    MAX_OPEN_SHARDS = 96  # a block of data.shuffle_shards and the next

    def __init__(
        self,
        index: Lengths | Mixture,
        processor: Processor,
        loss_weighting: str,
        blank_count: int,
        limits: Limits,
        views_of: Callable[[int], tuple[int, ...]] = one_view,
    ):
        self.mixture = index if isinstance(index, Mixture) else Mixture([Source(index=index)])
        self.processor = processor
        self.loss_weighting = loss_weighting
        self.blank_count = blank_count
        self.limits = limits
        self.views_of = views_of
        self.plan_of: Callable[[list[tuple[int, int]]], Any] | None = None
        """Set before the workers start: the tiles' sides -> the plan of their pooling, which batches then carry."""
        self._files: dict[Shard, Any] = {}

    def sample(self, sample_id: int, num_messages: int = 0) -> Sample:
        """One parsed sample by id; with `num_messages` the conversation ends after so many."""
        shard, offset, num_bytes = self._place(sample_id)
        sample = parse_sample(shard.read(self._open(shard), offset, num_bytes, self.limits), where=shard)
        sample = with_frames(sample, self.processor.frames)
        return first_messages(sample, int(num_messages)) if num_messages else sample

    def name_of(self, sample_id: int) -> str:
        """The words by which a person finds a sample: its shard and its key."""
        return f"{self.mixture.shard_of(sample_id)}:{self.sample(sample_id).key}"

    def __getitem__(self, plan: MicroBatchPlan) -> tuple[MicroBatchPlan, PackedBatch | UserError]:
        failpoints.hit("worker")
        try:
            return plan, self.batch(plan)
        except UserError as error:
            return plan, error

    def batch(self, plan: MicroBatchPlan) -> PackedBatch:
        """The packed batch of a plan; `skipped` says which samples are substitutes, and why.

        Raises:
            UserError: a shard that cannot be opened.
        """
        num_messages = np.zeros(len(plan.sample_ids), np.int64) if plan.num_messages is None else plan.num_messages
        items = zip(plan.sample_ids, plan.counts, num_messages)
        return collate(
            [view for item in items for view in self.prepared(*map(int, item))],
            plan.sample_ids,
            self.processor,
            self.loss_weighting,
            plan.total_weight,
            self.blank_count,
            plan_of=self.plan_of,
        )

    def prepared(self, sample_id: int, count: int, num_messages: int = 0) -> tuple[PreparedSample, ...]:
        """One sample as tokens and tiles, or the substitute in its place: a `PreparedSample` for each of its views."""
        num_text, num_tiles = self._planned(sample_id, num_messages)
        counts = self.views_of(count)
        key = ""
        try:
            sample = self.sample(sample_id, num_messages)
            key = sample.key
            views = prepare_views(sample, counts, self.processor, self.limits)
            came = len(views[0].input_ids) - len(views[0].visual), len(views[0].tiles)
            if came != (num_text, num_tiles):
                raise BadSample(
                    "length",
                    f"has {came[0]} text tokens and {came[1]} tiles, the index says {num_text} and {num_tiles}; "
                    "the shard has changed: index it again",
                )
            return views
        except BadSample as problem:
            shard, offset, _ = self._place(sample_id)
            problem = problem.located(shard, key, offset)
            blanks = [substitute(num_text, num_tiles, count, self.processor, problem) for count in counts]
            return blanks[0], *(replace(blank, is_further_view=True) for blank in blanks[1:])

    def _index_of(self, sample_id: int) -> tuple[Index, int]:
        """(the index that a sample is in, its number there)."""
        source, own = self.mixture.locate(sample_id)
        return cast(Index, source.index), own  # planning needs no more than lengths, reading does

    def _place(self, sample_id: int) -> tuple[Shard, int, int]:
        index, own = self._index_of(sample_id)
        return index.place(own)

    def _planned(self, sample_id: int, num_messages: int) -> tuple[int, int]:
        """(text tokens, tiles) of a sample, or of its first messages, by the index."""
        index, own = self._index_of(sample_id)
        if num_messages:
            return index.text_of_cut(own, num_messages)
        return int(index.text_tokens[own]), int(index.num_tiles[own])

    def _open(self, shard: Shard) -> Any:
        if shard not in self._files:
            if len(self._files) >= self.MAX_OPEN_SHARDS:
                self._files.pop(next(iter(self._files))).close()
            try:
                self._files[shard] = shard.open()
            except OSError as error:
                raise UserError(
                    f"{shard}: {error.strerror}; the shard was there when it was indexed: restore it or index again"
                ) from None
        return self._files[shard]


def batch_loader(
    dataset: PackDataset, plans: Iterable[MicroBatchPlan], num_workers: int, pin_memory: bool
) -> Generator[tuple[MicroBatchPlan, PackedBatch], None, None]:
    """Iterate (MicroBatchPlan, PackedBatch) in the order of `plans`, whatever the number of workers.

    Raises:
        UserError: a shard that could not be opened, when its turn comes.
    """
    loader = DataLoader(
        dataset,
        sampler=plans,  # type: ignore[arg-type]  # any iterable will do
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_quiet_worker if num_workers else None,
        generator=torch.Generator(),  # its own: opening a loader must not move the draws of dropout
    )
    for plan, batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield plan, batch


def _quiet_worker(worker_id: int) -> None:
    """Stop signals are for the trainer, which saves and then ends its workers; one thread each.

    SLURM sends them to every process of a rank, and torch takes a worker's death for an error.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
