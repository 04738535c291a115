"""Packed attention through every supported torch's own variable-length attention."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from tokenflex.model.attention import (
    _flash_attn,
    _sdpa_per_sample,
    _torch_varlen,
    causal_varlen,
    packed_attention,
    stated,
    varlen_with_sinks,
)

LENGTHS = [1, 5, 3]
CU_SEQ_LENS = torch.tensor([0, 1, 6, 9], dtype=torch.int32)


def reference(query, key, value, cu_seq, is_causal, scale, left=-1):
    """What torch computes, sample by sample, `left` keys back; heads must have been made equal."""
    assert query.shape == key.shape == value.shape
    rows = [x.split(cu_seq.diff().tolist()) for x in (query, key, value)]
    outputs = []
    for sample in zip(*rows):
        mask = torch.ones(len(sample[0]), len(sample[0]), dtype=torch.bool)
        mask = mask.tril() if is_causal else mask
        mask = mask.triu(-left) if left >= 0 else mask
        outputs.append(
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in sample), attn_mask=mask, scale=scale)
        )
    return torch.cat(outputs, dim=1).transpose(0, 1)


# torch's own operator needs a GPU. These take exactly what each version's takes (read off its wheel) and no more.


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert cu_seq_q is cu_seq_k and max_q == max_k == max(LENGTHS)
    return reference(query, key, value, cu_seq_q, is_causal, None)


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):  # fmt: skip
    assert window_size[1] == 0 or window_size == (-1, -1)
    assert max_q == max_k == max(LENGTHS)
    return reference(query, key, value, cu_seq_q, window_size[1] == 0, scale, window_size[0])


def torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


VERSIONS = {"2.10": torch_2_10, "2.11": torch_2_11} | dict.fromkeys(("2.12", "2.13", "2.14", "2.15"), torch_2_12)


def tensors(num_kv_heads, device="cpu", dtype=torch.float32, width=8):
    generator = torch.Generator().manual_seed(0)
    heads = (4, num_kv_heads, num_kv_heads)
    return [torch.randn(sum(LENGTHS), h, width, generator=generator).to(device, dtype) for h in heads]


@pytest.mark.parametrize("scaling", [None, 8**-0.5, 0.1])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_torchs_varlen_attention_gives_the_same(version, num_kv_heads, scaling):
    rows = [x.requires_grad_() for x in tensors(num_kv_heads)]
    ours = causal_varlen(VERSIONS[version], *rows, CU_SEQ_LENS, max(LENGTHS), scaling)
    wanted = _sdpa_per_sample(*rows, CU_SEQ_LENS, max(LENGTHS), scaling, 0.0)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        torch.autograd.grad(ours, rows, grad), torch.autograd.grad(wanted, rows, grad), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("window", [1, 2, 4, 5])
@pytest.mark.parametrize("version", VERSIONS)
def test_windows_go_to_every_torch_that_has_them(version, window):
    rows = [x.requires_grad_() for x in tensors(2)]
    if version == "2.10":
        with pytest.raises(ValueError, match=f"window of {window}; take torch 2.11"):
            causal_varlen(VERSIONS[version], *rows, CU_SEQ_LENS, max(LENGTHS), None, window)
        return
    ours = causal_varlen(VERSIONS[version], *rows, CU_SEQ_LENS, max(LENGTHS), None, window)
    wanted = written_out(*rows, window=window)
    assert_same_with_gradients(ours, wanted, rows)


def written_out(query, key, value, scaling=None, window=None, softcap=None, sinks=None):
    """Each query by itself, in plain words: what every backend must answer."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for begin, end in zip(CU_SEQ_LENS[:-1].tolist(), CU_SEQ_LENS[1:].tolist()):
        for place in range(begin, end):
            first = begin if window is None else max(begin, place - window + 1)
            heads = []
            for head in range(query.shape[1]):
                scores = key[first : place + 1, head // groups] @ query[place, head] * scaling
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                weights = scores.exp()
                total = weights.sum() if sinks is None else weights.sum() + sinks[head].exp()
                heads.append(weights @ value[first : place + 1, head // groups] / total)
            outputs.append(torch.stack(heads))
    return torch.stack(outputs)


def assert_same_with_gradients(ours, wanted, inputs):
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(wanted)
    theirs = torch.autograd.grad(wanted, inputs, grad)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, grad), theirs, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize("num_kv_heads, scaling", [(4, None), (2, 0.3), (1, None)])
def test_the_cpus_statement_is_what_is_written_down(num_kv_heads, scaling, window, softcap, sinks):
    rows = [x.requires_grad_() for x in tensors(num_kv_heads)]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True) if sinks else None
    ours = _sdpa_per_sample(*rows, CU_SEQ_LENS, max(LENGTHS), scaling, 0.0, window, softcap, sinks)
    wanted = written_out(*rows, scaling, window, softcap, sinks)
    assert_same_with_gradients(ours, wanted, rows if sinks is None else [*rows, sinks])


# Flash kernels in torch's signature: the backward pass is given output and log-sum-exp, and rebuilds the probabilities.


def flash_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None, window_size_left=None, window_size_right=None):  # fmt: skip
    scores, _ = flash_scores(query, key, cum_seq_q, scale, window_size_left)
    lse = scores.logsumexp(-1)
    output = torch.einsum("hqk,khd->qhd", (scores - lse[..., None]).exp(), value)
    return output, lse, torch.zeros(2), torch.zeros(0), torch.zeros(0)


def flash_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None):  # fmt: skip
    scores, _ = flash_scores(query, key, cum_seq_q, scale, window_size_left)
    weights = (scores - logsumexp[..., None]).exp()
    inner = (grad_out * out).sum(-1).T[..., None]
    grad_scores = weights * (torch.einsum("qhd,khd->hqk", grad_out, value) - inner)
    return (
        torch.einsum("hqk,khd->qhd", grad_scores, key) * scale,
        torch.einsum("hqk,qhd->khd", grad_scores, query) * scale,
        torch.einsum("hqk,qhd->khd", weights, grad_out),
    )


def flash_scores(query, key, cu_seq, scale, left):
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), cu_seq.diff())
    visible = (sample[:, None] == sample[None, :]).tril()
    visible = visible if left is None else visible.triu(-left)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return scores.masked_fill(~visible, float("-inf")), visible


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("num_kv_heads, scaling", [(4, None), (2, 0.3)])
def test_sinks_by_kernels_that_have_none(num_kv_heads, scaling, window):
    rows = [x.requires_grad_() for x in tensors(num_kv_heads)]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)
    kernels = (flash_forward, flash_backward)
    ours = varlen_with_sinks(*rows, sinks, CU_SEQ_LENS, max(LENGTHS), scaling, window, kernels)
    assert_same_with_gradients(ours, written_out(*rows, scaling, window, None, sinks), [*rows, sinks])


@pytest.mark.parametrize("operator, ours", [("_flash_attention_forward", flash_forward), ("_flash_attention_backward", flash_backward)])  # fmt: skip
def test_the_stand_ins_are_called_like_torchs_own(operator, ours):
    theirs = [argument.name for argument in getattr(torch.ops.aten, operator).default._schema.arguments]
    assert [name for name in theirs if name in inspect.signature(ours).parameters] == list(inspect.signature(ours).parameters)  # fmt: skip
    positional = [p.name for p in inspect.signature(ours).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert theirs[: len(positional)] == positional


def test_flash_attn_is_handed_windows_caps_and_narrow_values():
    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):  # fmt: skip
        assert causal and q.shape[-1] == v.shape[-1], "its heads must be equally wide"
        return _sdpa_per_sample(q, k, v, cu_q, max_q, softmax_scale, 0.0, window_size[0] + 1 or None, softcap or None)

    query, key, value = tensors(2)
    for narrow in (value, value[..., :5]):
        ours = _flash_attn(varlen, query, key, narrow, CU_SEQ_LENS, max(LENGTHS), 0.2, 0.0, 3, 1.5)
        torch.testing.assert_close(ours, written_out(query, key, narrow, 0.2, 3, 1.5), rtol=1e-5, atol=1e-6)
    old = lambda q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal, window_size: None
    with pytest.raises(ValueError, match="flash-attn>=2.6"):
        _flash_attn(old, query, key, value, CU_SEQ_LENS, max(LENGTHS), None, 0.0, None, 1.5)


class Layer(torch.nn.Module):
    """What a model's attention module tells about itself."""

    def __init__(self, layer_idx=0, is_causal=True, **config):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = SimpleNamespace(**config), layer_idx, is_causal


def call(module, rows, **arguments):
    rows = [x.transpose(0, 1).unsqueeze(0) for x in rows]
    lengths = {"cu_seq_lens_q": CU_SEQ_LENS, "max_length_q": max(LENGTHS)}
    return packed_attention(module, *rows, arguments.pop("attention_mask", None), **lengths, **arguments)[0].squeeze(0)


@pytest.mark.parametrize("name, value", [
    ("attention_mask", torch.zeros(1)), ("position_bias", torch.zeros(1)), ("indices", torch.zeros(1)),
    ("sinks", torch.zeros(4)), ("anything_new", 0), ("is_causal", False),
])  # fmt: skip
def test_what_would_be_dropped_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"packed attention got {name}"):
        call(Layer(), tensors(4), **{name: value})
    if name != "is_causal":
        call(Layer(), tensors(4), **{name: None})


def test_attention_that_is_not_causal_is_refused():
    with pytest.raises(ValueError, match="is_causal=False"):
        call(Layer(is_causal=False), tensors(4))
    with pytest.raises(ValueError, match="4 keys for 9 queries"):
        query, key, value = tensors(4)
        call(Layer(), (query, key[:4], value[:4]))


def test_a_window_that_only_the_configuration_tells_is_kept():
    types = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 2}
    rows = tensors(2)
    torch.testing.assert_close(call(Layer(0, **types), rows), written_out(*rows, window=2))
    torch.testing.assert_close(call(Layer(1, **types), rows), written_out(*rows))
    torch.testing.assert_close(call(Layer(1, **types), rows, sliding_window=3), written_out(*rows, window=3))


def test_a_chunk_is_a_sample_of_its_own():
    rows = tensors(4)
    ours = call(Layer(layer_types=["chunked_attention"], attention_chunk_size=2), rows)
    pieces = [(0, 1), (1, 3), (3, 5), (5, 6), (6, 8), (8, 9)]
    wanted = [stated(*(x[begin:end].transpose(0, 1) for x in rows)).transpose(0, 1) for begin, end in pieces]
    torch.testing.assert_close(ours, torch.cat(wanted))


def test_the_installed_torch_is_one_of_them():
    from torch.nn.attention.varlen import varlen_attn

    version = ".".join(torch.__version__.split(".")[:2])
    shape = lambda function: {p.name: (p.kind, p.default) for p in inspect.signature(function).parameters.values()}
    assert shape(varlen_attn) == shape(VERSIONS[version])


def test_what_torchs_own_does_not_take_is_refused():
    with pytest.raises(ValueError, match="attention_dropout=0"):
        _torch_varlen(*tensors(4), CU_SEQ_LENS, max(LENGTHS), None, 0.1)
    with pytest.raises(ValueError, match="caps them at 30; install flash-attn"):
        _torch_varlen(*tensors(4), CU_SEQ_LENS, max(LENGTHS), None, 0.0, softcap=30.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_torchs_own_on_a_gpu(num_kv_heads, scaling, window, has_sinks):
    rows = [x.requires_grad_() for x in tensors(num_kv_heads, "cuda", torch.bfloat16, width=64)]
    if has_sinks:
        rows.append(torch.tensor([0.5, -1.0, 2.0, 0.0], device="cuda", dtype=torch.bfloat16, requires_grad=True))
    lengths = CU_SEQ_LENS.cuda()
    exact = [x.detach().float().requires_grad_() for x in rows]
    sinks, exact_sinks = (rows[3], exact[3]) if has_sinks else (None, None)
    ours = _torch_varlen(*rows[:3], lengths, max(LENGTHS), scaling, 0.0, window, None, sinks)
    wanted = _sdpa_per_sample(*exact[:3], lengths, max(LENGTHS), scaling, 0.0, window, None, exact_sinks)
    grads = torch.autograd.grad(ours, rows, torch.ones_like(ours))
    for got, true in zip([ours, *grads], [wanted, *torch.autograd.grad(wanted, exact, torch.ones_like(wanted))]):
        assert (got.float() - true).norm() <= 1e-2 * true.norm()
