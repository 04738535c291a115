"""Attention within each sample of a pack: one interface, the fastest backend of the machine chosen once.

A pack is one row of tokens [1, T] that holds several samples; `cu_seq_lens_q` [samples + 1] marks where each begins. The
function is registered with transformers under the name `PACKED`, so every Hugging Face language model runs on it
unchanged. On GPU it is variable-length flash attention (`flash-attn` where installed, else torch's own); on CPU one exact
statement per sample, which does no work across samples either.

What a model's attention has beside the plain kind comes as arguments, and each is honoured or refused by name, never
dropped: a sliding window, a cap on the scores, sinks, chunks.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PACKED = "tokenflex_packed"

HARMLESS = {
    "cu_seq_lens_k", "max_length_k", "seq_idx", "cu_seqlens", "position_ids", "past_key_values", "cache", "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch", "is_causal",
    "deterministic", "layer_idx",
}  # fmt: skip
"""Arguments that models hand to every attention and that change nothing here: bookkeeping, or said by `cu_seq_lens_q`."""


def packed_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: torch.Tensor | None = None, cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention within each sample: query [1, H, T, K], key [1, H_kv, T, K], value [1, H_kv, T, K_v] -> [1, T, H, K_v], None.

    Args:
        scaling: of the scores; 1 / sqrt(K) by default.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: [H] sinks: one more score per head, which takes part in the softmax and has no value.

    Raises:
        ValueError: no `cu_seq_lens_q`, more than one row, an argument that packed attention does not know, or one that the
            backend of this machine does not take.
    """
    if cu_seq_lens_q is None or query.shape[0] != 1:
        raise ValueError(
            f"packed attention got a batch of {query.shape[0]} rows and cu_seq_lens_q={cu_seq_lens_q}; it wants one packed "
            "row with cu_seq_lens_q; for plain batches load the model with attn_implementation='sdpa'"
        )
    _refuse_unknown(module, query, key, attention_mask, kwargs)
    cu_seq_lens, max_length = _chunked(module, cu_seq_lens_q, max_length_q)
    sliding_window = sliding_window or _window_of_layer(module)
    if sliding_window is not None and sliding_window >= max_length:
        sliding_window = None  # every sample lies within it: the plain kind is exact, and faster
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, H, K]
    output = packed_backend(query.device.type)(
        query, key, value, cu_seq_lens, max_length, scaling, dropout, sliding_window, softcap, s_aux
    )
    return output.unsqueeze(0).contiguous(), None


def _refuse_unknown(module, query, key, attention_mask, kwargs):
    """Whatever would change the result and is not known here.

    Raises:
        ValueError: there is such a thing; the message names it.
    """
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in HARMLESS)
    if attention_mask is not None:
        unknown.append("attention_mask")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        unknown.append("is_causal=False")
    if query.shape[2] != key.shape[2]:
        unknown.append(f"{key.shape[2]} keys for {query.shape[2]} queries")
    if unknown:
        raise ValueError(
            f"packed attention got {', '.join(unknown)} from {type(module).__name__}, which it does not know and would "
            "drop; choose a language model whose attention is causal and plain, windowed, capped or with sinks"
        )


def _layer_type(module):
    """What the model's configuration calls this layer's attention; empty where it says nothing."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    place = getattr(module, "layer_idx", None)
    return types[place] if types and place is not None and place < len(types) else ""


def _window_of_layer(module):
    """The window of a layer that has one without saying so in its call: other backends get it by their mask."""
    return getattr(module.config, "sliding_window", None) if _layer_type(module) == "sliding_attention" else None


def _chunked(module, cu_seq_lens, max_length):
    """A layer that sees only its own chunk of each sample sees each chunk as a sample."""
    chunk = getattr(module.config, "attention_chunk_size", None) if _layer_type(module) == "chunked_attention" else None
    if chunk is None or max_length <= chunk:
        return cu_seq_lens, max_length
    begins, ends = cu_seq_lens[:-1].tolist(), cu_seq_lens[1:].tolist()
    cuts = [place for begin, end in zip(begins, ends) for place in range(begin, end, chunk)]
    return torch.tensor([*cuts, ends[-1]], dtype=cu_seq_lens.dtype, device=cu_seq_lens.device), chunk


def packing(cu_seq_lens: torch.Tensor, max_length: int, num_tokens: int) -> dict[str, torch.Tensor | int]:
    """What tells a language model where the samples of a pack begin, as arguments of its forward.

    Attention reads `cu_seq_lens_*`; convolutions and states of hybrid models also read `seq_idx`, each token's sample.
    """
    places = torch.arange(num_tokens, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    return {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": max_length,
        "max_length_k": max_length,
        "seq_idx": torch.searchsorted(cu_seq_lens[1:], places, right=True, out_int32=True)[None],
        "use_cache": False,
    }


@functools.lru_cache
def packed_backend(device_type: str) -> Callable[..., torch.Tensor]:
    """`(query_THK, key_THK, value_THK, cu_seq_lens, max_length, scaling, dropout, window, softcap, sinks) -> [T, H, K]`."""
    if device_type != "cuda":
        return _sdpa_per_sample
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return _torch_varlen
    return functools.partial(_flash_attn, flash_attn_varlen_func)


def _flash_attn(
    varlen_func, query, key, value, cu_seq_lens, max_length, scaling, dropout, window=None, softcap=None, sinks=None
):
    if (
        sinks is not None
    ):  # flash-attn has no gradient through its log-sum-exp; torch's kernels are called with it in ours
        return _torch_varlen(query, key, value, cu_seq_lens, max_length, scaling, dropout, window, softcap, sinks)
    options = {} if window is None else {"window_size": (window - 1, 0)}
    if softcap is not None:
        if "softcap" not in _parameters(varlen_func):
            raise ValueError(
                "this flash-attn takes no softcap, which the model's attention has; install flash-attn>=2.6"
            )
        options["softcap"] = softcap
    lengths = (cu_seq_lens, cu_seq_lens, max_length, max_length)
    output = varlen_func(
        query, key, _as_wide(value, query), *lengths, dropout_p=dropout, softmax_scale=scaling, causal=True, **options
    )
    return output[..., : value.shape[-1]]


def _as_wide(value, query):
    """`value` with heads as wide as the query's, which the kernels want; the columns added are zero."""
    return F.pad(value, (0, query.shape[-1] - value.shape[-1]))


def _torch_varlen(query, key, value, cu_seq_lens, max_length, scaling, dropout, window=None, softcap=None, sinks=None):
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError("torch's varlen attention has no dropout; set attention_dropout=0 or install flash-attn")
    if softcap is not None:
        raise ValueError(
            f"torch's varlen attention does not cap scores, and the model's caps them at {softcap:g}; install flash-attn"
        )
    wide = _as_wide(value, query)
    if sinks is None:
        output = causal_varlen(varlen_attn, query, key, wide, cu_seq_lens, max_length, scaling, window)
    else:
        output = varlen_with_sinks(query, key, wide, sinks, cu_seq_lens, max_length, scaling, window)
    return output[..., : value.shape[-1]]


def causal_varlen(
    varlen_attn: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    scaling: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention within each sample through any torch's `varlen_attn`: [T, H, K], twice [T, H_kv, K] -> [T, H, K].

    What it takes grew: torch 2.10 has `is_causal` and a fixed scale; 2.11 says causal by `window_size` and takes `scale`;
    2.12 adds `enable_gqa`. What a version lacks is done to its inputs.

    Raises:
        ValueError: a window, which torch 2.10 does not have.
    """
    known = _parameters(varlen_attn)
    if window is not None and "window_size" not in known:
        raise ValueError(
            f"torch {torch.__version__} has no windows in its varlen attention, and samples are longer than the model's "
            f"window of {window}; take torch 2.11 or newer, or install flash-attn"
        )
    left = -1 if window is None else window - 1
    options = {"window_size": (left, 0)} if "window_size" in known else {"is_causal": True}
    if scaling is not None and "scale" in known:
        options["scale"] = scaling
    elif scaling is not None:
        factor = scaling * query.shape[-1] ** 0.5  # exactly 1 for the usual scale, which must not cost a pass
        query = query if abs(factor - 1) < 1e-6 else query * factor
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return varlen_attn(query, key, value, cu_seq_lens, cu_seq_lens, max_length, max_length, **options)


@functools.lru_cache
def _parameters(function):
    return frozenset(inspect.signature(function).parameters)


def varlen_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    scaling: float | None = None,
    window: int | None = None,
    kernels: tuple[Callable, Callable] | None = None,
) -> torch.Tensor:
    """As `causal_varlen`, with one sink per head [H]; `kernels` are torch's own flash forward and backward by default."""
    if query.shape[1] != key.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernels = kernels or (torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward)
    return _WithSinks.apply(query, key, value, sinks, cu_seq_lens, max_length, scaling, window, kernels)


class _WithSinks(torch.autograd.Function):
    """Attention with sinks by kernels that have none.

    A sink adds exp(sink) to the softmax's denominator, so the output is rescaled by exp(lse - lse'), with lse' = log(exp(lse) +
    exp(sink)). The kernel's backward pass rebuilds the probabilities as exp(scores - lse) and takes the output for its inner
    product with the gradient: given lse' and the rescaled output, it is the backward pass of attention with sinks.
    """

    @staticmethod
    def forward(ctx, query, key, value, sinks, cu_seq_lens, max_length, scaling, window, kernels):
        options = {"scale": scaling}
        if window is not None:
            options.update(window_size_left=window - 1, window_size_right=0)
        lengths = (cu_seq_lens, cu_seq_lens, max_length, max_length)
        plain, lse_HT, rng_state, *_ = kernels[0](query, key, value, *lengths, 0.0, True, False, **options)
        with_sink_HT = torch.logaddexp(lse_HT, sinks.float()[:, None])
        output = (plain * (lse_HT - with_sink_HT).exp().T[..., None]).to(plain.dtype)
        ctx.save_for_backward(query, key, value, sinks, cu_seq_lens, output, with_sink_HT, rng_state)
        ctx.max_length, ctx.options, ctx.backward_kernel = max_length, options, kernels[1]
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, sinks, cu_seq_lens, output, with_sink_HT, rng_state = ctx.saved_tensors
        lengths = (cu_seq_lens, cu_seq_lens, ctx.max_length, ctx.max_length)
        unused = torch.empty(0, device=grad.device)
        grads = ctx.backward_kernel(
            grad.contiguous(),
            query,
            key,
            value,
            output,
            with_sink_HT,
            *lengths,
            0.0,
            True,
            rng_state,
            unused,
            **ctx.options,
        )
        share_HT = (
            sinks.float()[:, None] - with_sink_HT
        ).exp()  # the softmax's weight of the sink, whose value is zero
        grad_sinks = -(share_HT * (grad.float() * output.float()).sum(-1).T).sum(1)
        return (*grads[:3], grad_sinks.to(sinks.dtype), None, None, None, None, None)


def _sdpa_per_sample(
    query, key, value, cu_seq_lens, max_length, scaling, dropout, window=None, softcap=None, sinks=None
):
    lengths = cu_seq_lens.diff().tolist()
    outputs = []
    for sample in zip(query.split(lengths), key.split(lengths), value.split(lengths)):
        query_HTK, key_HTK, value_HTK = (x.transpose(0, 1) for x in sample)
        if softcap is not None or sinks is not None:
            outputs.append(stated(query_HTK, key_HTK, value_HTK, scaling, dropout, window, softcap, sinks))
            continue
        is_windowed = window is not None and query_HTK.shape[1] > window
        outputs.append(
            F.scaled_dot_product_attention(
                *(x.unsqueeze(0) for x in (query_HTK, key_HTK, value_HTK)),
                attn_mask=_visible(query_HTK.shape[1], window, query.device) if is_windowed else None,
                dropout_p=dropout,
                is_causal=not is_windowed,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            ).squeeze(0)
        )
    return torch.cat(outputs, dim=1).transpose(0, 1)


def stated(
    query_HTK: torch.Tensor,
    key_HTK: torch.Tensor,
    value_HTK: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of one sample as it is written down, every score held: [H, T, K_v]."""
    groups = query_HTK.shape[0] // key_HTK.shape[0]
    key_HTK, value_HTK = (x.repeat_interleave(groups, dim=0) for x in (key_HTK, value_HTK))
    scaling = query_HTK.shape[-1] ** -0.5 if scaling is None else scaling
    scores_HTT = (query_HTK @ key_HTK.mT).float() * scaling
    if softcap is not None:
        scores_HTT = softcap * torch.tanh(scores_HTT / softcap)
    length = query_HTK.shape[1]
    scores_HTT = scores_HTT.masked_fill(~_visible(length, window, scores_HTT.device), float("-inf"))
    if sinks is not None:
        scores_HTT = torch.cat([scores_HTT, sinks.float()[:, None, None].expand(-1, length, 1)], dim=-1)
    weights_HTT = F.dropout(scores_HTT.softmax(dim=-1), dropout)
    return weights_HTT[..., :length].to(value_HTK.dtype) @ value_HTK


def _visible(length, window, device):
    """Which keys each query sees: [T, T], true at and before it, as far back as the window goes."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible if window is None else visible.triu(1 - window)


def _no_mask(*args, **kwargs):
    """`cu_seq_lens_q` says all that a mask would: none is built."""
    return


def register_packed_attention() -> None:
    """Make `attn_implementation=PACKED` known to transformers; harmless to call again."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _no_mask)
