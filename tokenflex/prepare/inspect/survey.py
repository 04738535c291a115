"""What an inspection counts: lengths, images, tiles, sources and bad samples, over all or the first samples of each shard."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...budget import keyed_uniform
from ...data.clips import with_frames
from ...data.images import read_header
from ...data.problems import BadSample, Limits, Tally
from ...data.sample import Sample, encoded
from ...data.scan import Scanned, count_samples, scan_shard
from ...errors import UserError
from ..clips import frames_of
from ..validate import check_sample

if TYPE_CHECKING:
    from ...model import TokenFlexProcessor


@dataclass
class Surveyed:
    """One sample with its lengths: tokens are 0 without a processor.

    sizes: (width, height) per image. tiles: per image. num_text, num_learned: tokens without visual ones.
    """

    sample: Sample
    shard: str
    sizes: list[tuple[int, int]]
    tiles: list[int]
    num_text: int
    num_learned: int
    num_characters: int
    repairs: tuple[str, ...]


@dataclass
class Survey:
    """Columns over the surveyed samples, and those that are shown."""

    tally: Tally = field(default_factory=Tally)
    problems: list[BadSample] = field(default_factory=list)
    shown: list[Surveyed] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    text: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    num_held: int = 0
    """Samples that the shards hold, counted or not."""


def survey_shards(
    shards: Sequence[Path],
    processor: "TokenFlexProcessor | None",
    limits: Limits,
    *,
    num_shown: int = 24,
    max_samples: int = 5000,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Survey:
    """Survey shards: at most `max_samples` in all, the same number of each shard; `num_shown` drawn by `seed` are kept whole.

    Raises:
        UserError: a shard that cannot be opened, or no good sample in any.
    """
    survey, drawn = Survey(), _Drawn(num_shown, seed)
    per_shard = -(-max_samples // len(shards))
    for shard in shards:
        try:
            for _, scanned in zip(range(per_shard), scan_shard(shard, limits)):
                surveyed = _add(survey, scanned, shard, processor, limits)
                if surveyed is not None:
                    drawn.offer(survey.tally.num_samples - 1, surveyed)
                if progress:
                    progress(1)
            survey.num_held += count_samples(shard)
        except OSError as error:
            raise UserError(f"{shard}: {error.strerror}; give the path of a tar file") from None
    if not survey.tally.num_good:
        raise UserError(f"{shards[0]}: of {survey.tally.num_samples} samples none is good; see tokenflex data validate")
    survey.shown = drawn.in_order()
    return survey


class _Drawn:
    """The samples of the smallest keyed numbers, so that only as many as are shown are ever held."""

    def __init__(self, number: int, seed: int):
        self.number, self.seed = number, seed
        self._entries: list[tuple[float, int, Surveyed]] = []

    def offer(self, place: int, surveyed: Surveyed) -> None:
        """Keep the sample of a place if its number is among the smallest so far."""
        key = float(keyed_uniform(self.seed, 0, np.array([place]))[0])
        self._entries.append((key, place, surveyed))
        self._entries.sort(key=lambda entry: entry[0])
        del self._entries[self.number :]

    def in_order(self) -> list[Surveyed]:
        """The samples kept, by their places."""
        return [surveyed for _, _, surveyed in sorted(self._entries, key=lambda entry: entry[1])]


def _add(
    survey: Survey, scanned: Scanned, shard: Path, processor: "TokenFlexProcessor | None", limits: Limits
) -> Surveyed | None:
    """Count a sample; returns it measured, or None where it is bad."""
    try:
        sample = with_frames(scanned.whole, processor.frames if processor else frames_of)
        surveyed = _measured(sample, str(shard), processor, limits)
    except BadSample as problem:
        survey.problems.append(problem.located(shard, scanned.key, scanned.offset))
        survey.tally.skip(problem)
        return None
    survey.tally.keep(surveyed.repairs)
    survey.sources[surveyed.sample.source or surveyed.sample.task or "-"] += 1
    survey.text.append(surveyed.num_text if processor else surveyed.num_characters)
    survey.learned.append(surveyed.num_learned)
    survey.images.append(len(surveyed.tiles))
    survey.tiles.append(sum(surveyed.tiles))
    survey.turns.append(len(surveyed.sample.messages))
    survey.sizes += surveyed.sizes
    return surveyed


def _measured(sample: Sample, shard: str, processor: "TokenFlexProcessor | None", limits: Limits) -> Surveyed:
    repairs = check_sample(sample, limits)
    headers = [read_header(data, limits) for data in sample.images]
    sizes = [(header.width, header.height) for header in headers]
    tiles, num_text, num_learned = [1] * len(sizes), 0, 0
    if processor is not None:
        widths, heights = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
        tiles = processor.image_processor.num_tiles(widths, heights).tolist()
        tokens = encoded(processor, sample.messages, [0] * len(sizes))
        num_text, num_learned = len(tokens.input_ids), sum(tokens.is_target)
    characters = sum(len(item.get("text", "")) for message in sample.messages for item in message["content"])
    return Surveyed(sample, shard, sizes, tiles, num_text, num_learned, characters, repairs)
