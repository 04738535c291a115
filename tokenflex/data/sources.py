"""From the configuration's paths to what a run reads: shards located, each source's index opened, planned and loaded.

`open_data` is the whole way for a run; its parts stand alone for whoever needs less.
"""

import datetime
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..budget import VisualTokenBudget
from ..config import DataConfig, RunConfig, SourceConfig
from ..errors import UserError
from ..layout import MANIFEST
from ..plan import Mixture, Planner, Source
from .identity import data_identity
from .index import (
    Communicator,
    Index,
    complete_index,
    find_indexes,
    fingerprint,
    index_together,
    load_index,
    remove_index,
    sole_builder,
    tells_date,
)
from .index.together import on_main
from .loader import PackDataset
from .problems import Limits
from .processor import Processor
from .remote import locate_shards
from .shards import Shard


class Located(NamedTuple):
    """A source of the configuration and its shards."""

    source: SourceConfig
    shards: list[Shard]


class HasMain(Protocol):
    """Ranks of which one does what must be done once; see `tokenflex.parallel.Ranks`."""

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Run `function` on rank 0 while the others wait; its result, on every rank."""


class Here:
    """One process alone."""

    def on_main(self, function: Callable[[], Any]) -> Any:
        return function()


@dataclass(frozen=True)
class DataRun:
    """What a run reads: its planner, the data set that reads what was planned, and the processor that renders it.

    identity: what the samples are, as plain JSON; see `tokenflex.data.identity`.
    """

    planner: Planner
    dataset: PackDataset
    processor: Processor
    identity: dict[str, Any]

    def describe_dropped(self) -> list[str]:
        """A line for each reason why samples were not planned, or not whole, so far."""
        dropped = self.planner.dropped
        some = {reason: ", ".join(str(sample) for sample in ids[:10]) for reason, ids in dropped.ids.items()}
        return [f"data      {dropped.numbers[reason]} samples {reason} so far: {ids}" for reason, ids in some.items()]


def open_data(
    config: RunConfig,
    processor: Processor,
    ranks: HasMain,
    say: Callable[[str], None] = print,
    render_date: str = "",
) -> DataRun:
    """What a configured run reads; indexes that are missing are built by one process while the others wait.

    Args:
        processor: of the run's model (`tokenflex.model.build_processor`). It is given the run's `render_date`.
        ranks: those that call this together (`tokenflex.parallel.Ranks`), or `Here()`.
        render_date: ISO date that a chat template takes for today's; by default that of an index that fits, else today. A
            run that goes on hands in the one that it began with (`identity["render_date"]`).

    Raises:
        UserError: no shards, one that cannot be read, an index of another tokenizer, or a plan that cannot be.
    """
    limits = Limits.of(config.data)
    located = locate_sources(config.data)

    def build() -> tuple[str, list[str]]:
        settle_date(processor, located, config.data, render_date)
        folders = build_indexes(located, processor, config.data, max(1, config.data.num_workers))
        return processor.render_date, [str(folder) for folder in folders]

    processor.render_date, folders = ranks.on_main(build)
    indexes = open_indexes(located, folders, processor)
    for index, folder in zip(indexes, folders):
        if index.num_skipped():
            say(f"index     {index.num_skipped()} bad samples left out; {Path(folder) / MANIFEST} names them")
    mixture = mix(located, indexes)
    weighting = config.train.loss_weighting
    budget = VisualTokenBudget.of(config.budget)
    planner = Planner(mixture, budget, config.data, config.train.seed, weighting)
    dataset = PackDataset(mixture, processor, weighting, min(budget.counts), limits, budget.views)
    say(f"data      {planner.epoch_size} samples per epoch from {len(mixture.sources)} sources")
    names = [source.name for source in mixture.sources]
    return DataRun(planner, dataset, processor, data_identity(names, indexes, processor.render_date))


def source_configs(data: DataConfig) -> tuple[SourceConfig, ...]:
    """The sources of a data section: `data.sources`, or `data.train` as the only one.

    Raises:
        UserError: there is neither.
    """
    if not data.train and not data.sources:
        raise UserError(
            "data.train: empty; name shards to train on (tokenflex data convert writes them), or data.sources"
        )
    return data.sources or (SourceConfig(paths=data.train, over_long=data.over_long),)


def locate_sources(data: DataConfig) -> list[Located]:
    """The sources of a data section with their shards.

    Raises:
        UserError: no source, one without any shard, or a URL of a scheme that is not read.
    """
    names = [f"data.sources[{number}]" if data.sources else "data.train" for number in range(len(source_configs(data)))]
    return [
        Located(source, locate_shards(source.paths, data, name)) for source, name in zip(source_configs(data), names)
    ]


def settle_date(processor: Processor, located: Sequence[Located], data: DataConfig, render_date: str = "") -> None:
    """Give the processor the date that its chat template takes for today's; none where the template writes no date.

    Without `render_date` it is that of the newest index of the first source that fits otherwise, so that the next run on the
    same shards needs no other index because a day has passed; else today.
    """
    processor.render_date = ""
    if not tells_date(processor):
        return
    found = find_indexes(located[0].shards, data.cache_dir)
    dates = sorted({index.manifest.get("render_date", "") for index in found}, reverse=True)
    for date in [render_date] if render_date else [*filter(None, dates), datetime.date.today().isoformat()]:
        processor.render_date = date
        if fingerprint(processor) in (index.fingerprint for index in found):
            return


def build_indexes(
    located: Sequence[Located], processor: Processor, data: DataConfig, num_workers: int = 1
) -> list[Path]:
    """Check the indexes of located sources against their shards, and build what is missing; one process does it.

    Returns the index's folder of each.

    Raises:
        UserError: a shard that cannot be read, or that has changed since it was indexed.
    """
    folders, counted_by = [], fingerprint(processor)
    for _, shards in located:
        with sole_builder(shards, data.cache_dir, counted_by) as folder:
            complete_index(shards, processor, folder, Limits.of(data), num_workers)
            folders.append(folder)
    return folders


def index_sources(
    data: DataConfig, processor: Processor, mpi: Communicator, rebuild: bool = False, say: Callable[[str], None] = print
) -> None:
    """Bring the index of every source up to date, all processes together; with `rebuild` each shard is read again.

    Raises:
        UserError: a shard that cannot be read, on every process.
    """
    located = locate_sources(data)

    def settle() -> str:
        settle_date(processor, located, data)
        return processor.render_date

    processor.render_date = on_main(mpi, settle)
    counted_by = fingerprint(processor)
    for _, shards in located:
        with sole_builder(shards, data.cache_dir, counted_by) if mpi.rank == 0 else nullcontext() as folder:
            if rebuild and folder:
                remove_index(folder)
            index_together(shards, processor, mpi.bcast(folder), Limits.of(data), mpi, say)


def open_indexes(located: Sequence[Located], folders: Sequence[str | Path], processor: Processor) -> list[Index]:
    """The indexes of located sources, which `build_indexes` has checked and named.

    Raises:
        UserError: an index of another tokenizer.
    """
    return [load_index(folder, shards, processor) for (_, shards), folder in zip(located, folders)]


def mix(located: Sequence[Located], indexes: Sequence[Index]) -> Mixture:
    """The `Mixture` of located sources and their opened indexes.

    Raises:
        UserError: weights for some sources only, or a source without a sample.
    """
    return Mixture(
        [
            Source(
                index=index,
                name=", ".join(source.paths),
                weight=source.weight,
                epochs=source.epochs,
                over_long=source.over_long,
            )
            for (source, _), index in zip(located, indexes)
        ]
    )
