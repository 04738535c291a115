"""Before the first step: does this vision encoder, with this language model, do in a pack what it does alone?

Every part that transformers has can be named in a recipe, and some would train wrong without a word: a state or convolution
that runs on from one sample into the next, attention with a term that the pack's attention does not have, an encoder whose
features lie in another order. So a few tokens and images are run through the model of the run, as it will be trained, and
compared with the same tokens and images by themselves. Nothing is left changed: no gradient, no buffer, no random state.

Shape suffixes: B images, P patches, C vision width, L logits looked at, V vocabulary.
"""

import contextlib
import itertools
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

from ..errors import UserError
from .attention import PACKED, packing
from .modeling_tokenflex import TokenFlexForConditionalGeneration
from .pooling import sides_of
from .vision import is_hierarchical

TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Difference of a token's logits between pack and alone, as a share of their own length (both centred)."""

LEAK_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""The same for a sample whose neighbour has changed: most models do not move at all, mixtures of experts round anew."""

WHAT_WORKS = (
    "docs/models.md says which are known to work; model.probe=false trains all the same, and wrong where this is right"
)

PART_ERRORS = (
    TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError, AssertionError, ImportError,
    ArithmeticError,
)  # fmt: skip
"""What a part raises that cannot be used this way; a lack of memory is none of them."""


def probe(model: TokenFlexForConditionalGeneration, call: Callable, device: torch.device, pack_length: int) -> None:
    """Try the parts of `model` and leave everything as it was. Every rank of a run calls it.

    Args:
        model: `TokenFlexForConditionalGeneration` with packed attention; its parameters may be sharded.
        call: runs it, `(**inputs) -> outputs with logits`: the model itself or the engine around it.
        device: where its inputs go.
        pack_length: tokens that a pack, and so a sample, can have.

    Raises:
        UserError: a part fails or answers something else; the message names the part, what differs, and what to do.
    """
    with _undisturbed(model, device):
        _Probe(model, call, device, pack_length).run()


@contextlib.contextmanager
def _undisturbed(model, device):
    """Within this context the model evaluates; afterwards modes, buffers, attention and random states are what they were."""
    was_training = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        model.language_model.set_attn_implementation(PACKED)
        for module, training in was_training:
            module.training = training
        for buffer, before in buffers:
            buffer.data.copy_(before)


class _Probe:
    def __init__(self, model, call, device, pack_length):
        self.model, self.call, self.device = model, call, device
        self.config = model.config
        self.generator = torch.Generator().manual_seed(20)
        self.lengths = [9, 6]
        self.special = {self.config.image_start_token_id, self.config.image_token_id, self.config.image_end_token_id}
        self.limits = [n for n in critical_lengths(self.config.text_config) if n + 3 <= pack_length]
        self.lengths += [limit + 3 for limit in self.limits]
        self.count = min(self.config.trained_num_visual_tokens)

    def run(self) -> None:
        self._check_attention()
        self._check_images()
        self._check_text_only()
        self._check_packing()

    def _check_attention(self):
        text = self.model.language_model
        if text.config._attn_implementation != PACKED:
            raise _text_error(text, f"its attention cannot be replaced (it stays {text.config._attn_implementation!r})")

    # ---- the vision encoder

    def _check_images(self):
        """Each patch's features stand where the patch is, and an image's do not depend on its neighbours'."""
        try:
            rows, columns = self.model.patch_grid
        except ValueError as error:
            raise self._vision_error(str(error)) from None
        height, width = self.config.image_height, self.config.image_width
        places = _places(rows, columns)
        base = torch.rand(1, 3, height, width, generator=self.generator) * 2 - 1
        images = base.repeat(len(places) + 1, 1, 1, 1)
        size = height // rows, width // columns
        for image, (row, column) in zip(images[1:], places):
            patch = image[:, row * size[0] : (row + 1) * size[0], column * size[1] : (column + 1) * size[1]]
            patch.copy_(torch.rand(patch.shape, generator=self.generator) * 4 - 2)
        alone, together = self._features(base), self._features(images)
        for features_PC, number in ((alone, 1), (together, len(images))):
            if features_PC.shape[0] != number * rows * columns:
                raise self._vision_error(
                    f"it answers with {features_PC.shape[0]} features for {number} images of {rows} x {columns} patches"
                )
        if not together.isfinite().all():
            raise self._vision_error("its features are not finite")
        together = together.view(len(images), rows * columns, -1)
        difference = _difference(together[0], alone)
        if difference > TOLERANCE[self.model.dtype]:
            raise self._vision_error(
                f"an image's features differ by {difference:.2g} when others are encoded beside it"
            )
        moved = (together[1:] - together[:1]).float().norm(dim=-1).view(-1, rows, columns)
        if is_hierarchical(self.config.vision_config):
            moved = torch.nn.functional.max_pool2d(moved, 3, stride=1, padding=1)  # wide kernels: judged to the cell
        self._check_order(moved, places)

    def _check_order(self, moved, places):
        """`moved` [B, rows, columns]: where the features of image i changed, of which patch `places[i]` changed."""
        rows, columns = moved.shape[1:]
        shares = moved / moved.amax((1, 2), keepdim=True).clamp_min(1e-30)
        hypotheses = {"row by row": lambda r, c: r * columns + c}
        if rows * columns > 1:
            hypotheses["column by column"] = lambda r, c: c * rows + r
            hypotheses["upside down"] = lambda r, c: (rows - 1 - r) * columns + c
            hypotheses["mirrored"] = lambda r, c: r * columns + columns - 1 - c
            for shift in () if is_hierarchical(self.config.vision_config) else (1, -1):
                hypotheses[f"shifted by {shift}"] = lambda r, c, shift=shift: (
                    (r * columns + c + shift) % (rows * columns)
                )
        score = {
            name: sum(float(share.flatten()[place(*at)]) for share, at in zip(shares, places)) / len(places)
            for name, place in hypotheses.items()
        }
        best = max(score, key=score.get)
        if score["row by row"] < score[best] - 1e-6 or score["row by row"] < 0.5:
            found = f"they seem to lie {best}" if score[best] >= 0.5 else "they lie in no order known here"
            raise self._vision_error(
                f"a change in one patch does not move that patch's feature most (share {score['row by row']:.2f} of the largest); {found}"
            )

    def _features(self, pixel_values):
        """What the projector is given for `pixel_values`, by a forward pass of the whole model: [P, C]."""
        held = []
        handle = self.model.projector.register_forward_pre_hook(lambda module, inputs: held.append(inputs[0]))
        pieces = [self._text(2), *([self._image()] * len(pixel_values)), self._text(2)]
        try:
            self._forward([torch.cat(pieces)], pixel_values)
        finally:
            handle.remove()
        return held[0]

    def _vision_error(self, what):
        height, width = self.config.image_height, self.config.image_width
        return UserError(
            f"model.vision {self.config.vision_config.model_type} at {height} x {width} pixels: {what}; {WHAT_WORKS}"
        )

    # ---- the language model

    def _check_text_only(self):
        """A step without an image, and one whose image belongs to no token, which keeps the ranks in step."""
        ids = self._text(7)
        image = torch.zeros(1, 3, self.config.image_height, self.config.image_width)
        plain = self._forward([ids])
        dummy = self._forward([ids], image, is_dummy_image=True)
        if not plain.isfinite().all():
            raise _text_error(self.model.language_model, "its logits of text alone are not finite")
        difference = _difference(dummy, plain)
        if difference > LEAK_TOLERANCE[self.model.dtype]:
            raise _text_error(
                self.model.language_model, f"an image that belongs to no token moves its logits by {difference:.2g}"
            )

    def _check_packing(self):
        samples = [self._sample(length) for length in self.lengths]
        packed = self._packed(samples)
        neighbours = [self._sample(self.lengths[0]), *samples[1:]]
        leaked = max(map(_difference, self._packed(neighbours)[1:], packed[1:]))
        text = self.model.language_model
        if not leaked <= LEAK_TOLERANCE[self.model.dtype]:
            raise _text_error(
                text, f"samples of a pack reach each other: logits move by {leaked:.2g} with the sample before"
            )
        text.set_attn_implementation("eager")
        for number, (ids, images) in enumerate(samples):
            alone = self._forward([ids], images, packed=False)
            difference = _difference(packed[number], alone)
            if not difference <= TOLERANCE[self.model.dtype]:
                limit = f"; with data.pack_length={self.limits[0]} no sample is so long" if self.limits else ""
                raise _text_error(
                    text,
                    f"a sample of {len(ids)} tokens in a pack is {difference:.2g} off the same sample alone "
                    f"(logits, relative; {TOLERANCE[self.model.dtype]:g} is rounding){limit}",
                )
        text.set_attn_implementation(PACKED)

    def _packed(self, samples):
        logits = self._forward([ids for ids, _ in samples], torch.cat([image for _, image in samples]))
        return logits.split([_looked_at(len(ids)).stop - _looked_at(len(ids)).start for ids, _ in samples])

    def _sample(self, num_text_tokens):
        """Text with an image in it: token ids, pixel values [1, 3, H, W]."""
        image = torch.rand(1, 3, self.config.image_height, self.config.image_width, generator=self.generator) * 2 - 1
        half = num_text_tokens // 2
        return torch.cat([self._text(half), self._image(), self._text(num_text_tokens - half)]), image

    def _text(self, number):
        ids = torch.randint(0, self.config.text_config.vocab_size, (4 * number + 16,), generator=self.generator)
        pad = self.config.text_config.pad_token_id
        ids = ids[torch.tensor([int(i) not in self.special and int(i) != pad for i in ids])]
        return ids[:number]

    def _image(self):
        config = self.config
        return torch.tensor(
            [config.image_start_token_id, *[config.image_token_id] * self.count, config.image_end_token_id]
        )

    def _forward(self, samples, pixel_values=None, packed=True, **options):
        """Logits [L, V] at the last places of each sample, of samples (ids) in one row.

        Raises:
            UserError: the model raises, or answers with other logits than were asked for.
        """
        ids = torch.cat(samples)
        ends = torch.tensor([0, *itertools.accumulate(map(len, samples))], dtype=torch.int32)
        wanted = [torch.arange(len(one))[_looked_at(len(one))] + begin for one, begin in zip(samples, ends[:-1])]
        inputs = {
            "input_ids": ids[None].to(self.device),
            "position_ids": torch.cat([torch.arange(len(one)) for one in samples])[None].to(self.device),
            "logits_to_keep": torch.cat(wanted).to(self.device),
            **options,
        }
        if pixel_values is not None:
            places = (ids == self.config.image_token_id).nonzero().squeeze(1)
            number = pixel_values.shape[0]
            inputs |= {
                "pixel_values": pixel_values.to(self.device),
                "num_visual_tokens": [sides_of(self.count, self.model.patch_grid)] * number,
                "visual_positions": places.to(self.device),
            }
        inputs |= packing(ends.to(self.device), max(map(len, samples)), len(ids)) if packed else {"use_cache": False}
        try:
            logits = self.call(**inputs).logits[0]
        except torch.OutOfMemoryError:
            raise
        except PART_ERRORS as error:
            raise self._failure(error) from error
        if logits.shape[0] != len(inputs["logits_to_keep"]):
            raise _text_error(
                self.model.language_model,
                f"it answers with {logits.shape[0]} logits where {len(inputs['logits_to_keep'])} were asked for (logits_to_keep)",
            )
        return logits

    def _failure(self, error):
        """One line from what a part raised; which part it was is told by where it was raised."""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if _was_raised_within(error, self.model._visual_tokens.__code__, self.model.projector.forward.__code__):
            return self._vision_error(f"it cannot be run ({reason})")
        return _text_error(self.model.language_model, f"it cannot be run on packed samples ({reason})")


def critical_lengths(text_config: PreTrainedConfig) -> list[int]:
    """Sample lengths beyond which this language model does something else: windows, chunks, stretched positions."""
    names = ("sliding_window", "attention_chunk_size")
    lengths = {getattr(text_config, name, None) for name in names}
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        lengths.add(rope.get("original_max_position_embeddings") or text_config.max_position_embeddings)
    return sorted(length for length in lengths if length)


def _text_error(text, what):
    return UserError(f"model.text {text.config.model_type}: {what}; {WHAT_WORKS}")


def _was_raised_within(error, *codes):
    """Whether `error` was raised while one of these functions ran."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


def _looked_at(length):
    """The places of a sample whose logits are compared: all of a short one, the last of a long one."""
    return slice(max(0, length - 24), length)


def _places(rows, columns):
    """Patches to change, away from the border where there is room, none on a line of symmetry."""
    shares = ((0.2, 0.7), (0.7, 0.3), (0.45, 0.8), (0.8, 0.15), (0.15, 0.4), (0.6, 0.6))
    return sorted({(int(rows * r), int(columns * c)) for r, c in shares})


def _difference(ours, theirs):
    """The largest difference of a row, as a share of the row's own length, both centred; infinite where not finite."""
    ours, theirs = ours.float(), theirs.float()
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    length = (theirs - theirs.mean(-1, keepdim=True)).norm(dim=-1).clamp_min(1e-12)
    return float(((ours - theirs).norm(dim=-1) / length).max())
