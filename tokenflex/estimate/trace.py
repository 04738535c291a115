"""A model run on shapes alone: how many FLOPs its passes take and how many bytes they hold, with no weight and no GPU.

The model lies on torch's meta device and runs its own forward and backward pass there, so whatever its parts do is counted as
they do it: frozen parts save less, recomputation recomputes, a tied head is one weight. Attention alone is replaced: on meta it
would run as written down, every score held, and count the half that a causal mask hides.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from ..model import TokenFlexForConditionalGeneration
from ..model.attention import packing
from ..model.pooling import sides_of
from ..model.vision import patch_features


@dataclass
class Tally:
    """FLOPs of attention so far: `seen` of pairs that a query sees, `square` of all pairs of its sample."""

    seen: float = 0.0
    square: float = 0.0


@contextlib.contextmanager
def flash_shapes(tally: Tally) -> Iterator[None]:
    """Within this context `scaled_dot_product_attention` has the shapes, the memory and the FLOPs of flash attention.

    It keeps query, key, value, output and one number per query, never the scores; it computes nothing.
    """

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        return _Flash.apply(query, key, value, is_causal, tally)

    real = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention  # a mode would not be there where a backward pass recomputes
    try:
        with _NoValues():
            yield
    finally:
        F.scaled_dot_product_attention = real


class _NoValues(TorchFunctionMode):
    """Whoever asks a tensor without values whether it is true is told that it is not.

    transformers asks its position ids whether a row is packed; packed attention is told by other means, and no mask is built.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, is_causal, tally):
        queries, keys = query.shape[-2], key.shape[-2]
        heads = query.shape[:-2].numel()
        square = 2 * heads * queries * keys * (query.shape[-1] + value.shape[-1])
        ctx.flops = square * (queries + 1) / (2 * queries) if is_causal else square, square
        ctx.tally = tally
        _add(ctx, 1)
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, grad):
        _add(ctx, 2)
        return (*(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None, None)


def _add(ctx, times):
    ctx.tally.seen += times * ctx.flops[0]
    ctx.tally.square += times * ctx.flops[1]


class LiveBytes(TorchDispatchMode):
    """Bytes that are alive of what was made within this mode: `now`, and `peak` at their most."""

    def __init__(self, known: Sequence[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = WeakIdKeyDictionary()
        for tensor in known:
            self._sizes[tensor.untyped_storage()] = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, result)
        return result

    def _see(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self._sizes:
            self._sizes[storage] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes):
        self.now -= num_bytes


@dataclass(frozen=True, kw_only=True)
class Passes:
    """FLOPs of a forward pass and of forward and backward pass together; nothing that is recomputed counts twice."""

    forward: float
    total: float

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(forward=self.forward + other.forward, total=self.total + other.total)

    def __mul__(self, factor: float) -> "Passes":
        return Passes(forward=self.forward * factor, total=self.total * factor)


NOTHING = Passes(forward=0.0, total=0.0)


@dataclass(frozen=True, kw_only=True)
class UnitCosts:
    """FLOPs of what a step is made of, with the parts frozen as the model's parameters are.

    tile: vision encoder. visual_token: projector. token: language model without its attention. pair: its attention, each pair
    of a token and one that it sees (itself included). learned_token: the output layer.
    """

    tile: Passes
    visual_token: Passes
    token: Passes
    pair: Passes
    learned_token: Passes

    def of(
        self, *, tiles: float, visual_tokens: float, tokens: float, pairs: float, learned_tokens: float
    ) -> dict[str, Passes]:
        """FLOPs by cause of so much of each."""
        return {
            "vision": self.tile * tiles,
            "projector": self.visual_token * visual_tokens,
            "language": self.token * tokens,
            "attention": self.pair * pairs,
            "head": self.learned_token * learned_tokens,
        }


def unit_costs(model: TokenFlexForConditionalGeneration) -> UnitCosts:
    """`UnitCosts` of a model on the meta device, whose frozen parameters ask for no gradient.

    Raises:
        RuntimeError, NotImplementedError: a part that cannot run without weights (a mixture of experts whose router is read).
    """
    config, dtype = model.config, model.dtype
    trains = {
        name: any(p.requires_grad for p in getattr(model, name).parameters()) for name in ("vision_tower", "projector")
    }
    grid = model.patch_grid
    pixels = torch.empty(1, 3, config.image_height, config.image_width, dtype=dtype, device="meta")
    count = config.default_num_visual_tokens
    matrices, attention = _passes(lambda: patch_features(model.vision_tower, pixels, config.vision_feature_layer))
    features = torch.empty(grid[0] * grid[1], model.projector.norm.normalized_shape[0], dtype=dtype, device="meta")
    features.requires_grad_(trains["vision_tower"])
    visual = _passes(lambda: model.projector(features, [grid], [sides_of(count, grid)]))[0] * (1 / count)
    has_grad = any(trains.values())
    short, few = _language_passes(model, 8, 1, has_grad)
    long, _ = _language_passes(model, 16, 1, has_grad)
    more, _ = _language_passes(model, 8, 2, has_grad)
    return UnitCosts(
        tile=matrices + attention,
        visual_token=visual,
        token=(long + short * -1) * (1 / 8),
        pair=few * (1 / 36),
        learned_token=more + short * -1,
    )


def _language_passes(model, num_tokens, num_logits, has_grad):
    """(passes without attention, passes of attention alone) of one sample through the language model."""
    embeds = torch.empty(1, num_tokens, model.config.text_config.hidden_size, dtype=model.dtype, device="meta")
    embeds.requires_grad_(has_grad)
    inputs = {
        "inputs_embeds": embeds,
        "logits_to_keep": torch.arange(num_logits, device="meta"),
        **_layout([num_tokens]),
    }
    return _passes(lambda: model.language_model(**inputs).logits)


def _passes(run):
    """(`Passes` without attention, `Passes` of attention) of what `run()` answers with, and of its backward pass."""
    tally = Tally()
    with FlopCounterMode(display=False, custom_mapping=_experts_flops()) as counter, flash_shapes(tally):
        output = run()
        forward, attention = counter.get_total_flops(), tally.seen
        if output.requires_grad:
            output.sum().backward()
    matrices = Passes(forward=forward, total=counter.get_total_flops())
    return matrices, Passes(forward=attention, total=tally.seen)


def _experts_flops():
    """What torch's counter does not know: products of tokens with the expert that each was sent to."""

    def flops(left, right, *args, out_shape=None, **kwargs):
        return 2 * left[0] * left[1] * right[-1]

    return {torch.ops.aten._grouped_mm: flops}


def _layout(lengths):
    """What tells the language model where samples begin; their bounds are real numbers, which its attention reads."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    places = packing(bounds, max(lengths), sum(lengths))
    return {**places, "position_ids": torch.zeros(1, sum(lengths), dtype=torch.long, device="meta")}


@dataclass(frozen=True, kw_only=True)
class PackShape:
    """What decides the memory of a micro-batch.

    lengths: tokens of each sample. tiles: images or tiles. count: visual tokens of each. learned: tokens with a loss.
    """

    lengths: tuple[int, ...]
    tiles: int
    count: int
    learned: int

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return sum(self.lengths)

    def times(self, packs: int) -> "PackShape":
        """So many of them in one micro-batch."""
        lengths = tuple(length * packs for length in self.lengths)
        return replace(self, lengths=lengths, tiles=self.tiles * packs, learned=self.learned * packs)


def activation_bytes(model: TokenFlexForConditionalGeneration, pack: PackShape) -> int:
    """The most bytes that a forward and backward pass of a micro-batch holds, without weights, their gradients and logits.

    The model lies on the meta device and is trained (and recomputed, where that is enabled) as it stands. The gradient of each
    weight is given up as soon as it is whole: where gradients lie is a matter of the ZeRO stage.
    """
    with _without_gradients(model), flash_shapes(Tally()), LiveBytes([*model.parameters(), *model.buffers()]) as live:
        _logits(model, pack).float().sum().backward()
    return live.peak


def logits_bytes(model: TokenFlexForConditionalGeneration, num_learned: int, is_fused: bool) -> int:
    """The most bytes that the output layer and the loss hold for so many learned tokens; `is_fused` as torch's fused loss does."""
    head = model.get_output_embeddings() or model.language_model.get_output_embeddings()
    hidden = torch.empty(num_learned, head.weight.shape[1], dtype=head.weight.dtype, device="meta", requires_grad=True)
    targets = torch.empty(num_learned, dtype=torch.long, device="meta")
    with _without_gradients(head), LiveBytes([hidden, targets, *head.parameters()]) as live:
        if is_fused:
            options = torch.nn.LinearCrossEntropyOptions()
            losses = F.linear_cross_entropy(hidden, head.weight, targets, reduction="none", options=options)
        else:
            losses = F.cross_entropy(head(hidden).float(), targets, reduction="none")
        losses.sum().backward()
    return live.peak


def _logits(model, pack):
    """The model's answer to a pack of zeros, at a single place."""
    config, meta = model.config, torch.device("meta")
    tiles = max(pack.tiles, 1)  # a pack without an image runs a blank one
    images = torch.empty(tiles, config.image_height, config.image_width, 3, dtype=torch.uint8, device=meta)
    return model(
        input_ids=torch.zeros(1, pack.tokens, dtype=torch.long, device=meta),
        pixel_values=images.permute(0, 3, 1, 2).float().contiguous(),
        num_visual_tokens=[sides_of(pack.count, model.patch_grid)] * tiles,
        visual_positions=torch.zeros(pack.tiles * pack.count, dtype=torch.long, device=meta),
        is_dummy_image=not pack.tiles,
        logits_to_keep=torch.zeros(1, dtype=torch.long, device=meta),
        **_layout(pack.lengths),
    ).logits


@contextlib.contextmanager
def _without_gradients(module) -> Iterator[None]:
    def forget(parameter):
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(forget) for p in module.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
