"""Packed attention through every supported torch's own variable-length attention."""

import inspect

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from tokenflex.model.attention import _sdpa_per_sample, _torch_varlen, causal_varlen

LENGTHS = [1, 5, 3]
CU_SEQ_LENS = torch.tensor([0, 1, 6, 9], dtype=torch.int32)


def reference(query, key, value, cu_seq, is_causal, scale):
    """What torch computes, sample by sample; heads must have been made equal."""
    assert query.shape == key.shape == value.shape
    rows = [x.split(cu_seq.diff().tolist()) for x in (query, key, value)]
    outputs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in sample), is_causal=is_causal, scale=scale)
        for sample in zip(*rows)
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


# torch's own operator needs a GPU. These take exactly what each version's takes (read off its wheel) and no more.


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert cu_seq_q is cu_seq_k and max_q == max_k == max(LENGTHS)
    return reference(query, key, value, cu_seq_q, is_causal, None)


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):  # fmt: skip
    assert window_size in ((-1, 0), (-1, -1)) and max_q == max_k == max(LENGTHS)
    return reference(query, key, value, cu_seq_q, window_size == (-1, 0), scale)


def torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


VERSIONS = {"2.10": torch_2_10, "2.11": torch_2_11, "2.12": torch_2_12, "2.13": torch_2_12}


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


def test_the_installed_torch_is_one_of_them():
    from torch.nn.attention.varlen import varlen_attn

    version = ".".join(torch.__version__.split(".")[:2])
    shape = lambda function: {p.name: (p.kind, p.default) for p in inspect.signature(function).parameters.values()}
    assert shape(varlen_attn) == shape(VERSIONS[version])


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="attention_dropout=0"):
        _torch_varlen(*tensors(4), CU_SEQ_LENS, max(LENGTHS), None, 0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_torchs_own_on_a_gpu(num_kv_heads, scaling):
    rows = [x.requires_grad_() for x in tensors(num_kv_heads, "cuda", torch.bfloat16, width=64)]
    lengths = CU_SEQ_LENS.cuda()
    ours = _torch_varlen(*rows, lengths, max(LENGTHS), scaling, 0.0)
    exact = [x.detach().float().requires_grad_() for x in rows]
    wanted = _sdpa_per_sample(*exact, lengths, max(LENGTHS), scaling, 0.0)
    grads = torch.autograd.grad(ours, rows, torch.ones_like(ours))
    for got, true in zip([ours, *grads], [wanted, *torch.autograd.grad(wanted, exact, torch.ones_like(wanted))]):
        assert (got.float() - true).norm() <= 1e-2 * true.norm()
