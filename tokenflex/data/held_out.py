"""Held-out samples for validation while training: which, in which packs, at every count; the same on any number of ranks."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..budget import VisualTokenBudget
from ..config import RunConfig, SourceConfig
from ..errors import UserError
from ..plan import EMPTY, LengthTable, Mixture, Pack, Planner, Position, Source
from .images import decode_image
from .index import Index
from .loader import MicroBatchPlan, PackDataset
from .problems import BadSample, Limits
from .processor import Processor
from .remote import locate_shards
from .sources import HasMain, Located, build_indexes, mix, open_indexes

MAX_TASKS = 40
"""Tasks that are told apart; the samples of rarer ones are `other`."""
WHAT = "data.evaluation"


@dataclass(frozen=True)
class HeldOut:
    """Samples that are validated on.

    dataset: reads them. packs: of one count after the other, in rows that are equal side by side; last those without images.
    tasks: {sample id: task}. questions: ids of those that can be asked, where the model is to answer. counts: the visual-token
    counts that they are tried at.
    """

    dataset: PackDataset
    packs: tuple[tuple[Pack, ...], ...]
    tasks: dict[int, str]
    questions: frozenset[int]
    counts: tuple[int, ...]

    def plans(self, rank: int, num_ranks: int) -> Iterator[MicroBatchPlan]:
        """A rank's share, a pack at a time; every rank has as many, the last ones perhaps empty."""
        for packs in self.packs:
            missing = -len(packs) % num_ranks
            for pack in (*packs, *[EMPTY] * missing)[rank::num_ranks]:
                yield MicroBatchPlan(
                    Position(), True, pack.sample_ids, pack.counts, 1.0, num_messages=pack.num_messages
                )

    def num_plans(self, num_ranks: int) -> int:
        """How many each rank has."""
        return sum(-(-len(packs) // num_ranks) for packs in self.packs)


def open_held_out(
    config: RunConfig, processor: Processor, ranks: HasMain, say: Callable[[str], None] = print
) -> HeldOut:
    """Up to `evaluate.num_validation_samples` samples of `data.evaluation`, evenly spread over its shards, at every count.

    Those that are too long for a pack at the largest count are left out at all of them, so that every count answers for the
    same samples. Samples are read once, by one process, to learn their tasks.

    Args:
        processor: as the run's training data are rendered.

    Raises:
        UserError: no shard, one that cannot be read, or no sample that can be used.
    """
    data, counts = config.data, config.evaluate.num_visual_tokens
    source = SourceConfig(paths=data.evaluation, over_long="drop")
    located = [Located(source, locate_shards(source.paths, data, WHAT))]

    def build() -> list[str]:
        return [str(folder) for folder in build_indexes(located, processor, data, max(1, data.num_workers))]

    indexes = open_indexes(located, ranks.on_main(build), processor)
    weighting = config.train.loss_weighting
    dataset = PackDataset(mix(located, indexes), processor, weighting, min(counts), Limits.of(data))
    ids = _chosen(indexes[0], config)
    tasks, questions, bad = ranks.on_main(lambda: _tasks_of(dataset, ids, config.evaluate.answers))
    for line in bad[:10]:
        say(f"left out  {line}")
    if not tasks:
        raise UserError(f"{WHAT}: of {len(ids)} samples none is good; see tokenflex data validate")
    ids = np.array(sorted(tasks))
    packs = tuple(_packed(indexes[0], ids, count, config) for count in (*counts, 0))
    say(f"validate  {len(ids)} of {len(indexes[0])} samples of {len(set(tasks.values()))} tasks at {list(counts)}")
    return HeldOut(dataset, packs, tasks, frozenset(questions), tuple(counts))


def _chosen(index: Index, config: RunConfig) -> np.ndarray:
    """Ids of samples that can be used at every count, evenly spread."""
    largest = max(config.evaluate.num_visual_tokens)
    tokens = index.text_tokens.astype(np.int64) + index.num_tiles.astype(np.int64) * largest
    fits = (tokens <= config.data.pack_length) & (index.num_tiles <= config.data.max_images_per_pack)
    usable = np.flatnonzero(fits & (index.learned_tokens > 0))
    if not len(usable):
        raise UserError(
            f"{WHAT}: none of {len(index)} samples has an answer and fits a pack at {largest} visual tokens; raise data.pack_length, "
            "or leave that count out of evaluate.num_visual_tokens"
        )
    places = np.linspace(0, len(usable) - 1, min(config.evaluate.num_validation_samples, len(usable)))
    return usable[places.round().astype(np.int64)]


def _tasks_of(
    dataset: PackDataset, ids: Sequence[int] | np.ndarray, finds_questions: bool
) -> tuple[dict[int, str], list[int], list[str]]:
    """({id: task} of the samples that can be read, ids of those that can be asked, a line about each of the others).

    A question ends with its answer, and its images must decode: no rank may fail where the others generate.
    """
    tasks, questions, bad = {}, [], []
    for sample_id in map(int, ids):
        try:
            sample = dataset.sample(sample_id)
            tasks[sample_id] = sample.task or "all"
            if finds_questions and sample.messages[-1]["role"] == "assistant":
                for number, image in enumerate(sample.images):
                    decode_image(image, f"image {number}", dataset.limits)
                questions.append(sample_id)
        except BadSample as problem:
            bad.append(str(problem))
    common = {task for task, _ in Counter(tasks.values()).most_common(MAX_TASKS)}
    return {i: task if task in common else "other" for i, task in tasks.items()}, questions, bad


def _packed(index: Index, ids: np.ndarray, count: int, config: RunConfig) -> tuple[Pack, ...]:
    """The packs of samples with images at `count` visual tokens, or of those without at 0, as the planner lays them out."""
    has_image = index.num_tiles[ids] > 0
    ids = ids[has_image if count else ~has_image]
    if not len(ids):
        return ()
    table = LengthTable(
        text=index.text_tokens[ids], tiles=index.num_tiles[ids], learned=index.learned_tokens[ids], name=WHAT
    )
    row = min(config.data.lockstep_packs, len(ids))
    data = config.data.model_copy(update={"packs_per_step": row, "lockstep_packs": row, "mixing": "lockstep"})
    budget = VisualTokenBudget(counts=(count or 1,), probabilities=(1.0,))
    mixture = Mixture([Source(index=table, name=WHAT, over_long="drop")])
    planner = Planner(mixture, budget, data, 0, config.train.loss_weighting)
    steps = planner.epoch_steps(0)
    return tuple(replace(p, sample_ids=ids[p.sample_ids]) for step in steps for p in step.packs if len(p.sample_ids))
