"""From the configuration's paths to the sources of a plan: shards located, each source's index opened."""

from dataclasses import dataclass
from typing import Any

from ..budget import VisualTokenBudget
from ..config import SourceConfig
from ..errors import UserError
from ..plan import Mixture, Planner, Source
from .index import index_folder, load_index, load_or_build_index
from .loader import PackDataset
from .problems import Limits
from .remote import locate_shards


def source_configs(data):
    """The sources of a data section: `data.sources`, or `data.train` as the only one.

    Raises:
        UserError: there is neither.
    """
    if not data.train and not data.sources:
        raise UserError(
            "data.train: empty; name shards to train on (tokenflex data convert writes them), or data.sources"
        )
    return data.sources or (SourceConfig(paths=data.train, over_long=data.over_long),)


def locate_sources(data):
    """[(source, shards, index folder)] of a data section.

    Raises:
        UserError: no source, one without any shard, or a URL of a scheme that is not read.
    """
    located = []
    for number, source in enumerate(source_configs(data)):
        what = f"data.sources[{number}]" if data.sources else "data.train"
        shards = locate_shards(source.paths, data, what)
        located.append((source, shards, index_folder(shards, data.cache_dir)))
    return located


def build_indexes(located, processor, num_workers=1, limits=Limits()):  # noqa: B008  frozen
    """Check the indexes of located sources against their shards, and build what is missing; one process does it.

    Raises:
        UserError: see `load_or_build_index`.
    """
    for _, shards, folder in located:
        load_or_build_index(shards, processor, folder, num_workers, limits)


def open_mixture(located, processor):
    """The `Mixture` of located sources whose indexes `build_indexes` has checked.

    Raises:
        UserError: an index of another tokenizer, or weights for some sources only.
    """
    sources = []
    for source, shards, folder in located:
        index = load_index(folder, shards, processor)
        sources.append(
            Source(
                index=index,
                name=", ".join(source.paths),
                weight=source.weight,
                epochs=source.epochs,
                over_long=source.over_long,
            )
        )
    return Mixture(sources)


@dataclass(frozen=True)
class DataRun:
    """What a run reads: its planner, the data set that reads what was planned, and the processor that renders it."""

    planner: Planner
    dataset: PackDataset
    processor: Any

    def describe_dropped(self) -> list[str]:
        """A line for each reason why samples were not planned, or not whole, so far."""
        left_out = self.planner.left_out
        some = {reason: ", ".join(str(sample) for sample in ids[:10]) for reason, ids in left_out.ids.items()}
        return [f"data      {left_out.numbers[reason]} samples {reason} so far: {ids}" for reason, ids in some.items()]


def open_data(config, processor, ranks, say) -> DataRun:
    """From a configuration to what is read; rank 0 builds the indexes that are missing, the others wait.

    Raises:
        UserError: no shards, shards or an index that cannot be read, or a plan that cannot be.
    """
    located, limits = locate_sources(config.data), Limits.of(config.data)
    ranks.on_main(lambda: build_indexes(located, processor, max(1, config.data.num_workers), limits))
    mixture = open_mixture(located, processor)
    for source, (_, _, folder) in zip(mixture.sources, located):
        if source.index.num_skipped():
            say(f"index     {source.index.num_skipped()} bad samples left out; {folder / 'manifest.json'} names them")
    budget = VisualTokenBudget.of(config.budget)
    planner = Planner(mixture, budget, config.data, config.train.seed, config.train.loss_weighting)
    dataset = PackDataset(mixture, processor, config.train.loss_weighting, min(budget.counts), limits)
    say(f"data      {planner.epoch_size} samples per epoch from {len(mixture.sources)} sources")
    return DataRun(planner, dataset, processor)
