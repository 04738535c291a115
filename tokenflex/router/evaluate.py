"""Ask a model held-out questions at every count and at the router's, images encoded once."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..config import EvaluateConfig
from ..data import Limits
from ..data.images import read_header
from ..data.sample import Sample
from ..evaluate import exact_match
from ..model import TokenFlexForConditionalGeneration, TokenFlexProcessor
from ..model.modeling_tokenflex import image_runs
from .measure import measure
from .policies import Asked

EFFORTS = (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""That a router is evaluated at, beside its default."""


def _asked_at(model: TokenFlexForConditionalGeneration) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The counts and the efforts at which a model's router is compared."""
    settings = model.config.router
    return tuple(settings["num_visual_tokens"]), tuple(sorted({*EFFORTS, settings["effort"]}))


def ask(
    model: TokenFlexForConditionalGeneration,
    processor: TokenFlexProcessor,
    samples: Sequence[Sample],
    settings: EvaluateConfig,
    on_samples: Callable[[int], None] = lambda number: None,
) -> Asked:
    """Answers to the last message of samples with images: generated greedily at each of the router's counts and as it chooses.

    A choice that gives all images of a question one count has the answer of that count; others are generated as well.
    """
    counts, efforts = _asked_at(model)
    parts = []
    for begin in range(0, len(samples), settings.batch_size):
        batch = samples[begin : begin + settings.batch_size]
        parts.append(_Batch(model, processor, batch, settings).asked(counts, efforts))
        on_samples(len(batch))
    tiles, right, confidence, routed, spent, chosen = (np.concatenate(column) for column in zip(*parts))
    shares = np.stack([(chosen == count).mean(0) for count in counts], axis=1)
    keys, tasks = [sample.key for sample in samples], [sample.task for sample in samples]
    return Asked(keys, tasks, counts, efforts, tiles, right, confidence, routed, spent, shares)


def ask_teacher_forced(
    model: TokenFlexForConditionalGeneration,
    processor: TokenFlexProcessor,
    samples: Sequence[Sample],
    settings: EvaluateConfig,
    on_samples: Callable[[int], None] = lambda number: None,
) -> Asked:
    """The same without generating: the last message of a sample is right at a count if each of its tokens is the likeliest there.

    One pass per count, so many questions cost little. Where a choice gives the images of a question different counts, it is right
    only if it is right with all of them at each of these counts, which is stricter than generating.
    """
    counts, efforts = _asked_at(model)
    measured = measure(model, processor, samples, counts, settings.batch_size, on_samples)
    features, router = measured.features.to(model.device), model.router
    assert router is not None, "evaluate_router looks for it"
    chosen = np.array([router.choose(features, effort) for effort in efforts]).T
    right, routed, spent, tiles, kept = [], [], [], [], []
    for number, sample in enumerate(samples):
        rows = np.flatnonzero(measured.samples.numpy() == number)[-len(sample.images) :]  # of the last answer
        right.append(measured.right[rows[0]].numpy())
        at_counts = dict(zip(counts, right[-1]))
        routed.append([all(at_counts[count] for count in column) for column in chosen[rows].T])
        headers = [read_header(image, Limits()) for image in sample.images]
        sizes = np.array([(header.width, header.height) for header in headers])
        own = processor.image_processor.num_tiles(sizes[:, 0], sizes[:, 1])
        tiles.append(own.sum())
        spent.append(own @ chosen[rows])
        kept.append(rows)
    of_answers = chosen[np.concatenate(kept)]
    shares = np.stack([(of_answers == count).mean(0) for count in counts], axis=1)
    keys, tasks = [sample.key for sample in samples], [sample.task for sample in samples]
    columns = (np.array(tiles), np.array(right), None, np.array(routed), np.array(spent), shares)
    return Asked(keys, tasks, counts, efforts, *columns)


class _Batch:
    """Questions whose images have been encoded, to be asked at any counts."""

    def __init__(self, model, processor, samples, settings):
        self.model, self.processor, self.settings = model, processor, settings
        prompts = [sample.messages_with_images()[:-1] for sample in samples]
        inputs = processor.apply_chat_template(prompts, tokenize=True, add_generation_prompt=True).to(model.device)
        self.ids, self.mask, self.tiles = inputs["input_ids"], inputs["attention_mask"], inputs["num_tiles"]
        self.sizes = inputs.get("tile_sizes")
        with torch.no_grad():
            self.features = model.encode_images(inputs["pixel_values"].to(model.vision_tower.dtype))
        self.row_of = np.array([row for row, _, _ in image_runs(self.ids, model.config.image_token_id)])
        self.expected = ["".join(item["text"] for item in sample.messages[-1]["content"]) for sample in samples]

    def asked(self, counts, efforts):
        """(tiles [Q], right [Q, K], confidence [Q, K], routed [Q, E], spent [Q, E], chosen counts [images, E])."""
        num_images = np.bincount(self.row_of, minlength=len(self.expected))
        every = np.arange(len(self.expected))
        known: dict[tuple, tuple] = {}
        for count in counts:
            self._answer([(row, (count,) * num_images[row]) for row in every], known)
        chosen = np.array(
            [
                self.model.choose_num_visual_tokens(self.ids, self.features, self.mask, self.tiles, effort)
                for effort in efforts
            ]
        ).T
        wanted = [[(row, tuple(chosen[self.row_of == row, e].tolist())) for row in every] for e in range(len(efforts))]
        self._answer(sorted({key for keys in wanted for key in keys} - known.keys()), known)
        uniform = [[known[row, (count,) * num_images[row]] for count in counts] for row in every]
        tiles = np.array(self.tiles.tolist())
        return (
            np.bincount(self.row_of, weights=tiles, minlength=len(every)),
            np.array([[right for right, _ in row] for row in uniform]),
            np.array([[confidence for _, confidence in row] for row in uniform]),
            np.array([[known[key][0] for key in keys] for keys in wanted]).T,
            np.stack([np.bincount(self.row_of, tiles * column, len(every)) for column in chosen.T], axis=1),
            chosen,
        )

    def _answer(self, keys, known):
        """Ask questions at counts, keys (row, a count per image): `known[key]` becomes (right, confidence)."""
        for begin in range(0, len(keys), self.settings.batch_size):
            some = keys[begin : begin + self.settings.batch_size]
            rows = [row for row, _ in some]
            counts = [count for _, own in some for count in own]
            images = [image for row in rows for image in np.flatnonzero(self.row_of == row)]
            known.update(zip(some, zip(*self._generated(rows, images, counts))))

    def _generated(self, rows, images, counts):
        of_images = lambda values: torch.cat([values.split(self.tiles.tolist())[image] for image in images])  # noqa: E731
        output = self.model.generate(
            input_ids=self.ids[rows],
            attention_mask=self.mask[rows],
            pixel_values=of_images(self.features),
            num_tiles=self.tiles[images],
            tile_sizes=None if self.sizes is None else of_images(self.sizes),
            num_visual_tokens=counts,
            max_new_tokens=self.settings.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        new = output.sequences[:, self.ids.shape[1] :]
        answers = self.processor.batch_decode(new, skip_special_tokens=True)
        right = [exact_match(answer, self.expected[row]) for answer, row in zip(answers, rows)]
        return right, self._confidence(new, output.scores).tolist()

    def _confidence(self, new, scores):
        """The probability [Q] of what was generated, up to the token that ended it."""
        ends = self.model.generation_config.eos_token_id
        is_end = torch.isin(new, torch.tensor(ends, device=new.device))
        is_said = is_end.cumsum(1) - is_end.long() == 0
        log_probabilities = torch.stack(scores, dim=1).float().log_softmax(-1)
        own = log_probabilities.gather(2, new.unsqueeze(2)).squeeze(2)
        return own.masked_fill(~is_said, 0.0).sum(1).exp()
