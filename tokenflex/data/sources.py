"""From the configuration's paths to what a run reads: shards located, each source's index opened, planned and loaded.

`open_data` is the whole way for a run; its parts stand alone for whoever needs less.
"""

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
from .index import Communicator, Index, index_folder, index_together, load_index, load_or_build_index, sole_builder
from .index.together import remove_index
from .loader import PackDataset
from .problems import Limits
from .remote import locate_shards
from .shards import Shard


class Located(NamedTuple):
    """A source of the configuration, its shards, and where their index lies."""

    source: SourceConfig
    shards: list[Shard]
    folder: Path


@dataclass(frozen=True)
class DataRun:
    """What a run reads: its planner, the data set that reads what was planned, and the processor that renders it."""

    planner: Planner
    dataset: PackDataset
    processor: Any

    def describe_dropped(self) -> list[str]:
        """A line for each reason why samples were not planned, or not whole, so far."""
        dropped = self.planner.dropped
        some = {reason: ", ".join(str(sample) for sample in ids[:10]) for reason, ids in dropped.ids.items()}
        return [f"data      {dropped.numbers[reason]} samples {reason} so far: {ids}" for reason, ids in some.items()]


class HasMain(Protocol):
    """Ranks of which one does what must be done once; see `tokenflex.parallel.Ranks`."""

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Run `function` on rank 0 while the others wait; its result, on every rank."""


class Here:
    """One process alone."""

    def on_main(self, function: Callable[[], Any]) -> Any:
        return function()


def open_data(
    config: RunConfig,
    processor: Any,
    ranks: HasMain,
    say: Callable[[str], None] = print,
) -> DataRun:
    """What a configured run reads; indexes that are missing are built by one process while the others wait.

    Args:
        processor: of the run's model (`tokenflex.model.build_processor`).
        ranks: those that call this together (`tokenflex.parallel.Ranks`), or `Here()`.

    Raises:
        UserError: no shards, one that cannot be read, an index of another tokenizer, or a plan that cannot be.
    """
    limits = Limits.of(config.data)
    located = locate_sources(config.data)
    ranks.on_main(lambda: build_indexes(located, processor, limits, max(1, config.data.num_workers)))
    indexes = open_indexes(located, processor)
    mixture = mix(located, indexes)
    for index, (_, _, folder) in zip(indexes, located):
        if index.num_skipped():
            say(f"index     {index.num_skipped()} bad samples left out; {folder / MANIFEST} names them")
    weighting = config.train.loss_weighting
    budget = VisualTokenBudget.of(config.budget)
    planner = Planner(mixture, budget, config.data, config.train.seed, weighting)
    dataset = PackDataset(mixture, processor, weighting, min(budget.counts), limits)
    say(f"data      {planner.epoch_size} samples per epoch from {len(mixture.sources)} sources")
    return DataRun(planner, dataset, processor)


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
    located = []
    for number, source in enumerate(source_configs(data)):
        what = f"data.sources[{number}]" if data.sources else "data.train"
        shards = locate_shards(source.paths, data, what)
        located.append(Located(source, shards, index_folder(shards, data.cache_dir)))
    return located


def build_indexes(located: Sequence[Located], processor: Any, limits: Limits, num_workers: int = 1) -> None:
    """Check the indexes of located sources against their shards, and build what is missing; one process does it.

    Raises:
        UserError: see `load_or_build_index`.
    """
    for _, shards, folder in located:
        load_or_build_index(shards, processor, folder, limits, num_workers)


def index_sources(
    data: DataConfig, processor: Any, mpi: Communicator, rebuild: bool = False, say: Callable[[str], None] = print
) -> None:
    """Bring the index of every source up to date, all processes together; with `rebuild` each shard is read again.

    Raises:
        UserError: a shard that cannot be read, on every process.
    """
    for _, shards, folder in locate_sources(data):
        with sole_builder(folder) if mpi.rank == 0 else nullcontext():
            if rebuild and mpi.rank == 0:
                remove_index(folder)
            index_together(shards, processor, folder, Limits.of(data), mpi, say)


def open_indexes(located: Sequence[Located], processor: Any) -> list[Index]:
    """The indexes of located sources, which `build_indexes` has checked.

    Raises:
        UserError: an index of another tokenizer.
    """
    return [load_index(folder, shards, processor) for _, shards, folder in located]


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
            for (source, _, _), index in zip(located, indexes)
        ]
    )
