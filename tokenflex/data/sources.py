"""From the configuration's paths to the sources of a plan: shards located, each source's index opened."""

from ..config import SourceConfig
from ..errors import UserError
from ..plan import Mixture, Source
from .index import index_folder, load_index, load_or_build_index
from .problems import Limits
from .remote import locate_shards


def source_configs(data):
    """The sources of a data section: `data.sources`, or `data.train` as the only one."""
    return data.sources or (SourceConfig(paths=data.train, over_long=data.over_long),)


def locate_sources(data):
    """[(source, shards, index folder)] of a data section.

    Raises:
        UserError: no source, one without any shard, or a URL of a scheme that is not read.
    """
    if not data.train and not data.sources:
        raise UserError(
            "data.train: empty; name shards to train on (tokenflex data convert writes them), or data.sources"
        )
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
