"""From planned packs to tensors: one row of tokens that holds every sample of a micro-batch.

Shape suffixes of the fields: T tokens, S samples, B images, V visual tokens, L learned tokens.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from .plan import LOSS_WEIGHTS


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """What one rank runs through the model at once.

    input_ids, position_ids: [1, T] int64, positions restart in every sample. cu_seq_lens: [S + 1] int32, where each
    sample begins. max_length: the longest sample. images: [B, H, W, 3] bytes. counts: visual tokens per image.
    visual_positions: [V] places of the placeholders. logits_positions: [L] places whose logits are needed.
    targets: [L] the tokens to predict there. weights: [L] float32, the loss weight of each.
    is_dummy_image: there was no image; `images` holds one blank so that the vision encoder runs on every rank.
    sample_ids: [S] which samples. total_weight: of the whole optimizer step, over all ranks.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seq_lens: torch.Tensor
    max_length: int
    images: torch.Tensor
    counts: list
    visual_positions: torch.Tensor
    logits_positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    is_dummy_image: bool
    sample_ids: torch.Tensor
    total_weight: float

    def to(self, device):
        """The batch with its tensors on `device`; copies overlap with compute where the memory is pinned."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: t.to(device, non_blocking=True) for n, t in tensors.items() if torch.is_tensor(t)})

    def pin_memory(self):
        """Called by torch's DataLoader where the copy goes to a GPU."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: t.pin_memory() for n, t in tensors.items() if torch.is_tensor(t)})


def collate(samples, counts, sample_ids, processor, loss_weighting, total_weight, blank_count):
    """Samples of a micro-batch, each with its visual-token count, -> `PackedBatch`.

    `blank_count` is the visual-token count of the blank image that stands in where no sample has an image.

    Raises:
        UserError: an image that cannot be decoded.
    """
    weight_of = LOSS_WEIGHTS[loss_weighting]
    ids, positions, lengths, images, image_counts = [], [], [0], [], []
    visual, learned, weights = [], [], []
    for sample, count in zip(samples, counts):
        encoded = processor.encode(sample.decoded_messages(), [int(count)] * len(sample.images))
        start = len(ids)
        is_target = np.asarray(encoded.is_target)
        targets = np.flatnonzero(is_target)
        learned.append(start + targets)
        weights.append(np.full(len(targets), weight_of(np.array(len(targets)))))
        visual += [np.arange(count) + start + place for place in encoded.image_starts]
        images += [processor.image_processor.resized(image) for image in encoded.images]
        image_counts += [int(count)] * len(encoded.images)
        ids += encoded.input_ids
        positions.append(np.arange(len(encoded.input_ids)))
        lengths.append(len(encoded.input_ids))
    is_dummy_image = not images
    if is_dummy_image:
        size = processor.image_processor
        images, image_counts = [np.zeros((size.height, size.width, 3), np.uint8)], [blank_count]
    if not ids:  # an empty pack at the end of an epoch: one token, nothing learned
        ids, lengths, positions = [processor.image_end_token_id], [0, 1], [np.zeros(1, np.int64)]
    learned = _concatenate(learned)
    ids = torch.tensor(ids)
    return PackedBatch(
        input_ids=ids.unsqueeze(0),
        position_ids=_concatenate(positions).unsqueeze(0),
        cu_seq_lens=torch.tensor(np.cumsum(lengths), dtype=torch.int32),
        max_length=max(lengths),
        images=torch.from_numpy(np.stack(images)),
        counts=image_counts,
        visual_positions=_concatenate(visual),
        logits_positions=learned - 1,
        targets=ids[learned],
        weights=_concatenate(weights).float(),
        is_dummy_image=is_dummy_image,
        sample_ids=torch.as_tensor(np.asarray(sample_ids, dtype=np.int64)),
        total_weight=total_weight,
    )


def _concatenate(arrays):
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *arrays]))
