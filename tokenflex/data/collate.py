"""From planned packs to tensors: one row of tokens that holds every sample of a micro-batch.

A sample that cannot be used has a substitute of exactly its planned length and tiles, which teaches nothing: so the plan,
every rank's shapes and the order of samples stay what they are, and no other sample is drawn.

Shape suffixes of the fields: T tokens, S samples, B images or tiles, V visual tokens, L learned tokens.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from ..plan import LOSS_WEIGHTS
from .images import read_header
from .problems import BadSample, Limits
from .processor import ImageProcessor, Processor
from .sample import Sample, encoded


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """What one rank runs through the model at once.

    input_ids, position_ids: [1, T] int64, positions restart in every view of a sample (which has one, or one per count that it
    is seen at). cu_seq_lens: [views + 1] int32, where each begins. max_length: the longest. counts: [views] int64, the visual tokens per
    tile of each, 0 of one without images. images: [B, H, W, 3] bytes, one per
    tile. tile_counts: visual tokens of each tile of each view, on average over its sample. tile_sides: rows and columns of each. tile_index: which of the B tiles each of those is, or None where
    it is every one once. visual_positions: [V] places of the placeholders. logits_positions: [L] places whose logits are needed.
    targets: [L] the tokens to predict there. weights: [L] float32, the loss weight of each.
    teacher: [L] for a learned token the place among the L of the same token in the sample's first view, at the largest count;
    -1 in that view itself; None where no sample has several.
    is_dummy_image: there was no image; `images` holds one blank so that the vision encoder runs on every rank.
    pool_plan: the kernels' plan of the tiles' pooling, or None. sample_ids: [S] which samples. total_weight: of the whole
    optimizer step, over all ranks. skipped: a record (shard, key, offset, reason, detail, sample) of each sample that has a
    substitute.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seq_lens: torch.Tensor
    max_length: int
    counts: torch.Tensor
    images: torch.Tensor
    tile_counts: list[int]
    tile_sides: list[tuple[int, int]]
    visual_positions: torch.Tensor
    logits_positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    is_dummy_image: bool
    sample_ids: torch.Tensor
    total_weight: float
    skipped: tuple[dict[str, Any], ...] = ()
    pool_plan: Any = None
    tile_index: torch.Tensor | None = None
    teacher: torch.Tensor | None = None

    @property
    def learned_views(self) -> torch.Tensor:
        """[L] which view (of a sample; it has one, or several) each learned token is of."""
        return torch.searchsorted(self.cu_seq_lens.long(), self.logits_positions, right=True) - 1

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch with its tensors on `device`; copies overlap with compute where the memory is pinned."""
        return self._moved(lambda item: item.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        """Called by torch's DataLoader where the copy goes to a GPU."""
        return self._moved(lambda item: item.pin_memory())

    def _moved(self, change: Callable[[Any], Any]) -> "PackedBatch":
        """With every tensor, and the plan of the pooling, changed."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: change(item) for name, item in values.items() if hasattr(item, "pin_memory")}
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class PreparedSample:
    """One sample as tokens and tiles, at one visual-token count: one view of it.

    input_ids: list. learned: [L] places of the learned tokens. visual: [V] places of the placeholders. tiles: [B, H, W, 3]
    bytes. count: visual tokens per tile, on average where images share them by size. sides: (rows, columns) of each tile's. problem: why this is a substitute, if it is one. is_further_view: it has the same
    tiles and learned tokens as the view before it.
    """

    input_ids: list[int]
    learned: np.ndarray
    visual: np.ndarray
    tiles: np.ndarray
    count: int
    sides: list[tuple[int, int]]
    problem: BadSample | None = None
    is_further_view: bool = False


def prepare(sample: Sample, count: int, processor: Processor, limits: Limits) -> PreparedSample:
    """A parsed sample, decoded and rendered at `count` visual tokens per tile -> `PreparedSample`; see `prepare_views`."""
    return prepare_views(sample, (count,), processor, limits)[0]


def prepare_views(
    sample: Sample, counts: Sequence[int], processor: Processor, limits: Limits
) -> tuple[PreparedSample, ...]:
    """A parsed sample, decoded once and rendered at each of `counts` visual tokens per tile.

    Raises:
        BadSample: an image that is refused by its header or does not decode, or turns that the chat template refuses.
    """
    shown = [_shown(data, i, processor.image_processor, limits) for i, data in enumerate(sample.images)]
    joined = np.concatenate([_no_tiles(processor), *(tiles for tiles, _ in shown)])
    views = []
    for number, count in enumerate(counts):
        counts_of_images = processor.shared_counts(count, [sizes.tolist() for _, sizes in shown])
        lengths = [len(tiles) * own for (tiles, _), own in zip(shown, counts_of_images)]
        tokens = encoded(processor, sample.messages, lengths)
        view = PreparedSample(
            input_ids=tokens.input_ids,
            learned=np.flatnonzero(tokens.is_target),
            visual=_concatenated([np.arange(n) + start for n, start in zip(lengths, tokens.image_starts)]),
            tiles=joined,
            count=count,
            sides=[
                side
                for (_, sizes), own in zip(shown, counts_of_images)
                for side in processor.tile_sides(own, sizes.tolist())
            ],
            is_further_view=number > 0,
        )
        views.append(view)
    return tuple(views)


def _shown(data: bytes, number: int, image_processor: ImageProcessor, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    try:
        read_header(data, limits)
        return image_processor.shown(data)
    except BadSample as problem:
        raise BadSample(problem.reason, f"image {number}: {problem.detail}") from None
    except (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, KeyError, OverflowError) as error:
        detail = f"image {number}: not a readable image ({' '.join(str(error).split())}); repair or remove the sample"
        raise BadSample("image-data", detail) from None


def substitute(
    num_text_tokens: int, num_tiles: int, count: int, processor: Processor, problem: BadSample
) -> PreparedSample:
    """What stands in for a bad sample: as many tokens and tiles as were planned, all of them blank, none learned."""
    blank = processor.image_processor
    return PreparedSample(
        input_ids=[processor.image_token_id] * (num_tiles * count) + [processor.image_end_token_id] * num_text_tokens,
        learned=np.empty(0, np.int64),
        visual=np.arange(num_tiles * count),
        tiles=np.zeros((num_tiles, blank.height, blank.width, 3), np.uint8),
        count=count,
        sides=_blank_sides(num_tiles, count, processor),
        problem=problem,
    )


def collate(
    samples: Sequence[PreparedSample],
    sample_ids: Sequence[int] | np.ndarray,
    processor: Processor,
    loss_weighting: str,
    total_weight: float,
    blank_count: int,
    *,
    plan_of: Callable[[list[tuple[int, int]]], Any] | None = None,
) -> PackedBatch:
    """`PreparedSample`s of a micro-batch -> `PackedBatch`; of a sample with several views they stand side by side, and
    `sample_ids` has it once.

    `blank_count` is the visual-token count of the blank image that stands in where no sample has an image. `plan_of` makes
    a pooling plan of the tiles' sides (`TokenAdaptiveProjector.plan_maker`).
    """
    lengths = [len(sample.input_ids) for sample in samples] or [1]
    begins = np.cumsum([0, *lengths])
    # an empty pack at the end of an epoch: one token, nothing learned
    tokens = [token for sample in samples for token in sample.input_ids] or [processor.image_end_token_id]
    first_views = [sample for sample in samples if not sample.is_further_view]
    tiles = np.concatenate([_no_tiles(processor), *(sample.tiles for sample in first_views)])
    is_dummy_image = not len(tiles)
    tiles = np.zeros((1, *tiles.shape[1:]), np.uint8) if is_dummy_image else tiles
    shapes = [(sample.count, side) for sample in samples for side in sample.sides]
    shapes = shapes or [(blank_count, side) for side in _blank_sides(1, blank_count, processor)]
    tile_sides = [side for _, side in shapes]
    learned = torch.from_numpy(_concatenated([begin + sample.learned for begin, sample in zip(begins, samples)]))
    weights = [np.full(len(s.learned), LOSS_WEIGHTS[loss_weighting](np.array(len(s.learned)))) for s in samples]
    ids = torch.tensor(tokens)
    return PackedBatch(
        input_ids=ids.unsqueeze(0),
        position_ids=torch.from_numpy(_concatenated([np.arange(length) for length in lengths])).unsqueeze(0),
        cu_seq_lens=torch.tensor(begins, dtype=torch.int32),
        max_length=max(lengths),
        counts=torch.tensor([sample.count for sample in samples] or [0]),
        images=torch.from_numpy(tiles),
        tile_counts=[count for count, _ in shapes],
        tile_sides=tile_sides,
        visual_positions=torch.from_numpy(_concatenated([b + s.visual for b, s in zip(begins, samples)])),
        logits_positions=learned - 1,
        targets=ids[learned],
        weights=torch.from_numpy(np.concatenate([np.empty(0), *weights])).float(),
        is_dummy_image=is_dummy_image,
        sample_ids=torch.as_tensor(np.asarray(sample_ids, dtype=np.int64)),
        total_weight=total_weight,
        skipped=_skipped(first_views, sample_ids),
        pool_plan=plan_of(tile_sides) if plan_of else None,
        **(_relations(samples) if len(first_views) < len(samples) else {}),
    )


def _skipped(samples: Sequence[PreparedSample], sample_ids: Sequence[int] | np.ndarray) -> tuple[dict[str, Any], ...]:
    return tuple(
        {**sample.problem.record(), "sample": int(sample_id)}
        for sample, sample_id in zip(samples, sample_ids)
        if sample.problem is not None
    )


def _relations(samples: Sequence[PreparedSample]) -> dict[str, torch.Tensor]:
    """`tile_index` and `teacher` of a `PackedBatch`, where samples have several views."""
    tile_index, teacher = [], []
    next_tile = next_learned = first_tile = first_learned = 0
    for sample in samples:
        if not sample.is_further_view:
            first_tile, first_learned = next_tile, next_learned
            next_tile += len(sample.tiles)
        tile_index.append(first_tile + np.arange(len(sample.tiles)))
        places = np.arange(len(sample.learned))
        teacher.append(first_learned + places if sample.is_further_view else np.full(len(places), -1))
        next_learned += len(places)
    return {
        "tile_index": torch.from_numpy(_concatenated(tile_index)),
        "teacher": torch.from_numpy(_concatenated(teacher)),
    }


def _blank_sides(num_tiles: int, count: int, processor: Processor) -> list[tuple[int, int]]:
    size = (processor.image_processor.height, processor.image_processor.width)
    return processor.tile_sides(count, [size] * num_tiles)


def _no_tiles(processor: Processor) -> np.ndarray:
    return np.empty((0, processor.image_processor.height, processor.image_processor.width, 3), np.uint8)


def _concatenated(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *arrays])
