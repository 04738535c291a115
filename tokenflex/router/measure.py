"""What a model makes of answers at each count, from one pass of the vision encoder: what a router learns from.

Shape suffixes: B batch rows, T tokens, R rows (an image of an answer each), K counts, F features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..data.sample import Sample
from ..model import TokenFlexForConditionalGeneration, TokenFlexProcessor
from ..model.modeling_tokenflex import image_runs, resize_image_runs


@dataclass(frozen=True)
class Measured:
    """Answers under teacher forcing, a row per image that an answer had before it.

    features: [R, F] what the router will see. losses: [R, K] mean cross-entropy of the answer's tokens at each count. right:
    [R, K] whether each of them was the likeliest. samples: [R] number of the conversation. tasks: by conversation.
    """

    features: torch.Tensor
    losses: torch.Tensor
    right: torch.Tensor
    samples: torch.Tensor
    tasks: list[str]


@torch.no_grad()
def measure(
    model: TokenFlexForConditionalGeneration,
    processor: TokenFlexProcessor,
    samples: Sequence[Sample],
    counts: Sequence[int],
    batch_size: int,
    on_samples: Callable[[int], None] = lambda number: None,
) -> Measured:
    """Run conversations with images through the model at every count; the vision encoder sees each image once.

    `model.config.router` must say which tokens end a turn. Every answer of a conversation counts for itself; images that stand
    behind it are not its own.
    """
    parts = []
    for begin in range(0, len(samples), batch_size):
        batch = samples[begin : begin + batch_size]
        parts.append(_measure_batch(model, processor, batch, counts, begin))
        on_samples(len(batch))
    features, losses, right, numbers = (torch.cat(column) for column in zip(*parts))
    return Measured(features, losses, right, numbers, [sample.task for sample in samples])


def _measure_batch(model, processor, samples, counts, first):
    """(features, losses, right, numbers of samples) of one batch, on the CPU."""
    inputs = processor.apply_chat_template(
        [sample.messages_with_images() for sample in samples],
        tokenize=True,
        return_assistant_tokens_mask=True,
        num_visual_tokens=counts[0],
    ).to(model.device)
    inputs["pixel_values"] = model.encode_images(inputs["pixel_values"].to(model.vision_tower.dtype))
    answers = image_runs(inputs["assistant_masks"], 1)
    at_counts = [_losses(model, inputs, count) for count in counts]
    losses = torch.stack([losses for losses, _ in at_counts], dim=1).cpu()
    right = torch.stack([right for _, right in at_counts], dim=1).cpu()
    features, answer_of = [], []
    for number, (row, start, _) in enumerate(answers):
        seen = _seen(model, inputs, row, start)
        if seen is not None:
            features.append(model.router_features(**seen).cpu())
            answer_of += [number] * len(features[-1])
    rows = torch.tensor([row for row, _, _ in answers])[answer_of]
    width = model.new_router().center.numel()
    return (
        torch.cat(features) if features else torch.empty(0, width),
        losses[answer_of],
        right[answer_of],
        rows + first,
    )


def _losses(model, inputs, count):
    """Mean loss of each answer of a batch at a count, and whether all its tokens were the likeliest: [answers] both."""
    ids, mask, tiles = inputs["input_ids"], inputs["attention_mask"], inputs["num_tiles"].tolist()
    image = model.config.image_token_id
    lengths = [count * number for number in tiles]
    wide_ids, wide_mask = resize_image_runs(ids, mask, lengths, image, model.generation_config.pad_token_id or 0)
    learned = torch.zeros_like(wide_ids, dtype=torch.bool)
    learned[(wide_ids != image) & wide_mask.bool()] = inputs["assistant_masks"][(ids != image) & mask.bool()].bool()
    columns = learned.any(0).nonzero().squeeze(1)
    logits_BUV = model(
        input_ids=wide_ids,
        attention_mask=wide_mask,
        position_ids=(wide_mask.cumsum(-1) - 1).clamp(min=0),
        pixel_values=inputs["pixel_values"],
        num_tiles=inputs["num_tiles"],
        tile_sizes=inputs.get("tile_sizes"),
        num_visual_tokens=[count] * len(tiles),
        logits_to_keep=columns - 1,
        use_cache=False,
    ).logits
    is_learned_BU = learned[:, columns]
    logits, targets = logits_BUV[is_learned_BU].float(), wide_ids[:, columns][is_learned_BU]
    pieces = [length for _, _, length in image_runs(learned.long(), 1)]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").split(pieces)
    hits = (logits.argmax(-1) == targets).split(pieces)
    return torch.stack([loss.mean() for loss in losses]), torch.stack([hit.all() for hit in hits])


def _seen(model, inputs, row, start):
    """What stands before an answer of a row as the arguments of `router_features`; None where no image does."""
    runs = image_runs(inputs["input_ids"], model.config.image_token_id)
    own = [number for number, (of, begin, _) in enumerate(runs) if of == row and begin < start]
    if not own:
        return None
    tiles = inputs["num_tiles"].tolist()
    first = sum(tiles[: own[0]])
    num_tiles = tiles[own[0] : own[-1] + 1]
    return {
        "input_ids": inputs["input_ids"][row : row + 1, :start],
        "attention_mask": inputs["attention_mask"][row : row + 1, :start],
        "pixel_values": inputs["pixel_values"][first : first + sum(num_tiles)],
        "num_tiles": num_tiles,
    }
