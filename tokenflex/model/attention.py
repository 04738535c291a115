"""Attention within each sample of a pack: one interface, the fastest backend of the machine chosen once.

A pack is one row of tokens [1, T] that holds several samples; `cu_seq_lens_q` [samples + 1] marks where each begins. The
function is registered with transformers under the name `PACKED`, so every Hugging Face language model runs on it
unchanged. On GPU it is variable-length flash attention (`flash-attn` where installed, else torch's own); on CPU one
scaled-dot-product call per sample, which does no work across samples either.
"""

import functools
import inspect

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PACKED = "tokenflex_packed"


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
    cu_seq_lens_q=None, max_length_q=None, **kwargs,
):  # fmt: skip
    """Causal attention within each sample: query [1, H, T, K], key and value [1, H_kv, T, K] -> [1, T, H, K], None.

    Raises:
        ValueError: no `cu_seq_lens_q`, more than one row, or samples longer than the model's sliding window.
    """
    if cu_seq_lens_q is None or query.shape[0] != 1:
        raise ValueError(
            f"packed attention got a batch of {query.shape[0]} rows and cu_seq_lens_q={cu_seq_lens_q}; it wants one packed "
            "row with cu_seq_lens_q; for plain batches load the model with attn_implementation='sdpa'"
        )
    if sliding_window is not None and max_length_q > sliding_window:
        raise ValueError(
            f"a sample of {max_length_q} tokens exceeds the model's sliding window of {sliding_window}; packed attention is "
            "full within a sample: set use_sliding_window=False in the text config or shorten the samples"
        )
    backend = packed_backend(query.device.type)
    rows = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]  # [T, H, K]
    return backend(*rows, cu_seq_lens_q, max_length_q, scaling, dropout).unsqueeze(0), None


@functools.lru_cache
def packed_backend(device_type):
    """The function `(query_THK, key_THK, value_THK, cu_seq_lens, max_length, scaling, dropout) -> [T, H, K]` for a device."""
    if device_type != "cuda":
        return _sdpa_per_sample
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return _torch_varlen

    def flash(query, key, value, cu_seq_lens, max_length, scaling, dropout):
        lengths = (cu_seq_lens, cu_seq_lens, max_length, max_length)
        return flash_attn_varlen_func(
            query, key, value, *lengths, dropout_p=dropout, softmax_scale=scaling, causal=True
        )

    return flash


def _torch_varlen(query, key, value, cu_seq_lens, max_length, scaling, dropout):
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError("torch's varlen attention has no dropout; set attention_dropout=0 or install flash-attn")
    return causal_varlen(varlen_attn, query, key, value, cu_seq_lens, max_length, scaling)


def causal_varlen(varlen_attn, query, key, value, cu_seq_lens, max_length, scaling=None):
    """Causal attention within each sample through any torch's `varlen_attn`: [T, H, K], twice [T, H_kv, K] -> [T, H, K].

    What it takes grew: torch 2.10 has `is_causal` and a fixed scale; 2.11 says causal by `window_size` and takes `scale`;
    2.12 adds `enable_gqa`. What a version lacks is done to its inputs.
    """
    known = _parameters(varlen_attn)
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
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


def _sdpa_per_sample(query, key, value, cu_seq_lens, max_length, scaling, dropout):
    lengths = cu_seq_lens.diff().tolist()
    outputs = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1).unsqueeze(0) for x in sample),
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        for sample in zip(query.split(lengths), key.split(lengths), value.split(lengths))
    ]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def _no_mask(*args, **kwargs):
    """`cu_seq_lens_q` says all that a mask would: none is built."""
    return


def register_packed_attention():
    """Make `attn_implementation=PACKED` known to transformers; harmless to call again."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _no_mask)
