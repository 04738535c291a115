"""What a step holds: tokens, tiles, pairs, learned tokens, and the pack that needs the most memory.

From the plan of the recipe's own samples where their index is there, from a table of lengths, or from assumed samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..budget import VisualTokenBudget
from ..config import DataConfig, RunConfig
from ..data.index import find_indexes, open_index
from ..data.sources import locate_sources
from ..errors import UserError
from ..plan import Lengths, Mixture, Planner, Source
from ..plan.table import LengthTable
from ..plan.window import Window
from .trace import PackShape

MAX_PACKS = 20_000
"""Of a plan that are looked at; the means of so many are within a fraction of a percent."""
SAMPLES_OF_A_TRACE = 8
"""Memory depends on the tokens of a pack, hardly on how many samples they are."""


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """Means of a step over all ranks. pairs: of a token and one before it (or itself) in its sample."""

    tokens: float
    tiles: float
    visual_tokens: float
    pairs: float
    learned_tokens: float
    samples: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What steps of a recipe hold. step: their means. worst: no pack holds more of anything. source: where it is from."""

    step: StepWork
    worst: PackShape
    source: str


@dataclass(frozen=True, kw_only=True)
class AssumedSamples:
    """Samples where no data are at hand: each an image of `tiles` tiles with `text_tokens` of text, half of them learned."""

    text_tokens: int = 128
    tiles: int = 1


def workload_of(config: RunConfig, lengths: Lengths | None = None, assumed: AssumedSamples | None = None) -> Workload:
    """The `Workload` of a recipe.

    Args:
        config: the recipe, its sources resolved to where they lie.
        lengths: of the samples to plan instead of the recipe's own (a table or an index).
        assumed: what samples are taken to be where there are no others; with it the recipe's own are not looked for.

    Raises:
        UserError: a plan that cannot be.
    """
    if lengths is not None:
        return planned(_planner(config, [Source(index=lengths, over_long="drop")]), f"a plan of {_name(lengths)}")
    sources = [] if assumed else indexed_sources(config.data)
    if sources:
        names = ", ".join(source.name for source in sources)
        return planned(_planner(config, sources), f"a plan of {names}")
    return assumed_workload(config, assumed or AssumedSamples())


def _name(lengths: Lengths) -> str:
    return str(getattr(lengths, "name", "the index"))


def indexed_sources(data: DataConfig) -> list[Source]:
    """The sources of a data section whose newest index lies beside their shards or in the cache; empty unless all have one.

    Nothing is built, and no tokenizer is asked whether an index is its own.
    """
    try:
        located = locate_sources(data)
    except UserError:
        return []
    sources = []
    for source, shards in located:
        found = find_indexes(shards, data.cache_dir)
        if not found:
            return []
        newest = max(found, key=lambda index: (index.folder / "manifest.json").stat().st_mtime_ns)
        sources.append(
            Source(
                index=open_index(newest.folder),
                name=", ".join(source.paths),
                weight=source.weight,
                epochs=source.epochs,
                over_long=source.over_long,
            )
        )
    return sources


def _planner(config: RunConfig, sources: list[Source]) -> Planner:
    budget = VisualTokenBudget.of(config.budget)
    return Planner(Mixture(sources), budget, config.data, config.train.seed, config.train.loss_weighting)


def planned(planner: Planner, source: str) -> Workload:
    """The `Workload` of the first epoch of a plan, or of its first `MAX_PACKS` packs."""
    budget = planner.budget
    packs = [packs_of(window, budget) for window in windows(planner, MAX_PACKS)]
    columns = {name: np.concatenate([getattr(part, name) for part in packs]) for name in Packs.__annotations__}
    every = Packs(**columns)
    per_step = planner.data.packs_per_step / len(every.tokens)
    means = {name: float(getattr(every, name).sum()) * per_step for name in StepWork.__annotations__}
    per_tile = budget.visual_tokens(np.array(budget.counts)).tolist()
    fullest = int(every.tiles.argmax())
    mean_count = every.visual_tokens[fullest] / max(
        every.tiles[fullest], 1
    )  # packs of several counts go by the next trained one
    worst = PackShape(
        lengths=_split(int(every.tokens.max())),
        tiles=int(every.tiles.max()),
        count=min((c for c in per_tile if c >= mean_count), default=max(per_tile)),
        learned=int(every.learned_tokens.max()),
    )
    return Workload(step=StepWork(**means), worst=worst, source=source)


def windows(planner: Planner, most: int) -> Iterator[Window]:
    """Windows of the first epoch, until they have so many packs."""
    num_packs = 0
    for _, window, _ in planner.windows(0):
        yield window
        num_packs += window.num_packs
        if num_packs >= most:
            return


@dataclass(frozen=True, kw_only=True)
class Packs:
    """Columns of packs in planned order, all [packs]: what `StepWork` has of a step."""

    tokens: np.ndarray
    tiles: np.ndarray
    visual_tokens: np.ndarray
    pairs: np.ndarray
    learned_tokens: np.ndarray
    samples: np.ndarray


def packs_of(window: Window, budget: VisualTokenBudget) -> Packs:
    """The packs of a planned window, with every view of their samples."""
    samples = window.samples
    tokens, tiles = samples.tokens.astype(np.float64), samples.tiles
    visual = tiles * budget.visual_tokens(samples.count)
    views = np.where(tiles > 0, budget.num_views, 1)
    text = (tokens - visual) / views
    pairs = _pairs(text + tiles * samples.count)
    for count in budget.others:
        pairs = pairs + np.where(tiles > 0, _pairs(text + tiles * count), 0)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(window.pack, weights=values, minlength=window.num_packs)

    return Packs(
        tokens=total(tokens),
        tiles=total(tiles),
        visual_tokens=total(visual),
        pairs=total(pairs),
        learned_tokens=total(samples.learned * views),
        samples=total(np.ones_like(tokens)),
    )


def _pairs(lengths: np.ndarray) -> np.ndarray:
    return lengths * (lengths + 1) / 2


def limit_pack(data: DataConfig, budget: VisualTokenBudget) -> PackShape:
    """The pack that no plan can exceed: full of tokens, of as many tiles as fit, every text token learned.

    Tiles are dear in the encoder and tokens in the language model, so the most tiles come at the smallest count.
    """
    count = int(budget.visual_tokens(np.array(budget.counts)).min())
    tiles = min(data.max_images_per_pack, (data.pack_length - 1) // count)
    learned = data.pack_length - tiles * count
    return PackShape(lengths=_split(data.pack_length), tiles=tiles, count=count, learned=learned)


def assumed_workload(config: RunConfig, assumed: AssumedSamples) -> Workload:
    """The `Workload` of samples that are all alike, in full packs; the worst pack is the one that no plan can exceed."""
    budget, data = VisualTokenBudget.of(config.budget), config.data
    text, tiles = assumed.text_tokens, assumed.tiles
    packs, sums = float(data.packs_per_step), np.zeros(6)
    for count, share in zip(budget.counts, budget.probabilities):
        count = int(budget.within_total(np.array(count), np.array(tiles)))
        visual = int(budget.visual_tokens(np.array(count)))
        views = [text + tiles * view for view in (budget.views(count) if tiles else (0,))]
        length = sum(views)
        if length > data.pack_length or tiles > min(data.max_images_per_pack, budget.most_tiles):
            raise UserError(
                f"--text-tokens {text}, --tiles {tiles}: a sample has {length} tokens at {visual} per tile, a pack holds "
                f"{data.pack_length} and {min(data.max_images_per_pack, budget.most_tiles)} tiles; assume smaller ones"
            )
        pairs = float(_pairs(np.array(views)).sum())
        per_sample = np.array([length, tiles, tiles * visual, pairs, len(views) * text / 2, 1.0])
        sums += share * per_sample
    fit = [data.pack_length / sums[0], data.max_images_per_pack / tiles if tiles else np.inf]
    step = StepWork(**dict(zip(StepWork.__annotations__, (sums * min(fit) * packs).tolist())))
    source = f"assumed samples of {text} text tokens and {tiles} {'tile' if tiles == 1 else 'tiles'}, packs full"
    return Workload(step=step, worst=limit_pack(data, budget), source=source)


def resampled(lengths: list[Lengths], num_samples: int, seed: int = 0) -> LengthTable:
    """A table of `num_samples` samples drawn from those of several, for plans of more packs than there are samples."""
    columns = [
        np.concatenate([np.asarray(getattr(table, name), np.int64) for table in lengths])
        for name in ("text_tokens", "num_tiles", "learned_tokens")
    ]
    drawn = np.random.default_rng(seed).integers(0, len(columns[0]), num_samples)
    text, tiles, learned = (column[drawn] for column in columns)
    return LengthTable(text=text, tiles=tiles, learned=learned, name=f"{num_samples} samples drawn anew")


def _split(tokens: int) -> tuple[int, ...]:
    """Lengths of a few samples with so many tokens together."""
    number = min(SAMPLES_OF_A_TRACE, tokens)
    return tuple(np.diff(np.linspace(0, tokens, number + 1).astype(int)).tolist())
