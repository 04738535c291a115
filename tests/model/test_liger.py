"""Liger's kernels in the language model: where they apply, what is said where they do not, and the same answers."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokenflex.errors import UserError
from tokenflex.model.liger import KERNELS, apply_liger

TYPES = ("qwen3", "qwen2", "llama", "mistral")


def language_model(model_type, **options):
    """A tiny language model whose norms do something."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = CONFIG_MAPPING[model_type](**sizes, intermediate_size=48, vocab_size=101, pad_token_id=0, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def answer(model, device="cpu"):
    """Loss and gradients over a row whose positions begin anew, as in a pack."""
    ids = torch.randint(101, (1, 13), generator=torch.Generator().manual_seed(1)).to(device)
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None].to(device)
    mask = torch.ones(1, 1, 13, 13, dtype=torch.bool).tril()
    mask[..., 6:, :6] = False
    loss = model(input_ids=ids, position_ids=positions, attention_mask=mask.to(device)).logits.square().mean()
    return {"loss": loss.item()}, dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss, [*model.parameters()]))
    )


def test_off_and_auto_without_a_gpu_leave_the_model_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = language_model("qwen3")
    before = {name: type(module).forward for name, module in model.named_modules()}
    assert not apply_liger(model, "off") and not apply_liger(model, "auto")
    assert before == {name: module.forward.__func__ for name, module in model.named_modules()}


def test_on_without_liger_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="^model.liger=on: liger-kernel is not installed; pip install liger-kernel; or"
    ) as error:
        apply_liger(language_model("qwen3"), "on")
    assert "\n" not in str(error.value)
    assert not apply_liger(language_model("qwen3"), "auto")


def test_on_without_a_gpu_or_kernels_is_one_line(monkeypatch):
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="^model.liger=on: Liger's kernels need a GPU"):
        apply_liger(language_model("qwen3"), "on")
    model = language_model("qwen3")
    model.config.model_type = "gpt2"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="^model.liger=on: Liger has no kernels for language models of type gpt2"):
        apply_liger(model, "on")
    assert not apply_liger(model, "auto")


# Liger patches whole modules of transformers, so whatever applies it runs in a process of its own.
PATCHED = """
import json, sys
import torch
from test_liger import TYPES, answer, language_model
from transformers.integrations.liger import apply_liger_kernel
from tokenflex.model.liger import KERNELS, apply_liger
plain = {name: language_model(name) for name in TYPES}
wanted = {name: answer(model) for name, model in plain.items()}
errors = {}
for name, model in plain.items():  # rotary embeddings only: Liger's other kernels do not run in Triton's interpreter
    apply_liger_kernel(model, {**KERNELS, "rms_norm": False, "swiglu": False})
    (loss, grads), (true_loss, true_grads) = answer(model), wanted[name]
    errors[name] = max((grads[key] - true_grads[key]).norm().item() / true_grads[key].norm().item() for key in grads)
    errors[name] = max(errors[name], abs(loss["loss"] / true_loss["loss"] - 1))
torch.cuda.is_available = lambda: True
names = {}
for name in TYPES:
    model = language_model(name)
    before = list(model.state_dict())
    assert apply_liger(model, "on") and list(model.state_dict()) == before
    layer = model.model.layers[0]
    names[name] = [layer.input_layernorm._get_name(), model.model.norm._get_name(), layer.mlp._get_name(),
                   sys.modules[type(model).__module__].apply_rotary_pos_emb.__name__, model.forward.__func__.__module__]
    assert type(language_model(name).model.layers[0].mlp).__module__ == type(model).__module__, "later models are plain"
biased = language_model("llama", hidden_act="gelu", mlp_bias=True)
assert apply_liger(biased, "on") and biased.model.layers[0].mlp._get_name() == "LlamaMLP", "Liger's is SiLU"
print(json.dumps([errors, names]))
"""


@pytest.fixture(scope="module")
def patched():
    pytest.importorskip("liger_kernel")
    here = os.path.dirname(__file__)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", "-c", PATCHED]
    end = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert end.returncode == 0, end.stderr[-3000:]
    return json.loads(end.stdout.splitlines()[-1])


def test_ligers_rope_answers_as_the_models_own_under_the_interpreter(patched):
    errors, _ = patched
    assert set(errors) == set(TYPES) and max(errors.values()) < 1e-5, errors


def test_norms_rope_and_mlp_become_ligers_and_the_models_forward_stays(patched):
    _, names = patched
    for model_type, (first_norm, last_norm, mlp, rope, forward) in names.items():
        assert (first_norm, last_norm, mlp) == ("LigerRMSNorm", "LigerRMSNorm", "LigerSwiGLUMLP"), model_type
        assert rope == "liger_rotary_pos_emb" and forward.startswith("transformers."), model_type
    assert not KERNELS["fused_linear_cross_entropy"]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU: Liger's RMSNorm and SwiGLU run nowhere else"
)
@pytest.mark.parametrize("model_type", TYPES)
def test_the_patched_model_answers_as_the_plain_one_on_a_gpu(model_type):
    pytest.importorskip("liger_kernel")
    model = language_model(model_type).cuda()
    loss, grads = answer(model, "cuda")
    assert apply_liger(model, "on")
    liger_loss, liger_grads = answer(model, "cuda")
    assert abs(liger_loss["loss"] / loss["loss"] - 1) < 1e-4
    for name, grad in grads.items():
        assert (liger_grads[name] - grad).norm() <= 1e-3 * grad.norm(), name
