"""Laws of frozen weights in 8 bit: close to their source, gradients as through the weights they stand for, and bytes alone are kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.config import load_config
from tokenflex.errors import UserError
from tokenflex.estimate.memory import ModelSizes, checkpoint_bytes, stage_memory
from tokenflex.model import build_model
from tokenflex.model.adapters import merged
from tokenflex.model.attention import packing
from tokenflex.model.build import shaped_model
from tokenflex.model.compiled import compile_blocks
from tokenflex.model.int8 import Int8Linear, hold_in_int8, quantize_rows, whole_rows
from tokenflex.train.optimizer import parameter_groups

DTYPES = [torch.float32, torch.bfloat16]


@settings(deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 33),
    power=st.integers(-30, 30),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_no_weight_is_off_by_more_than_half_a_scale_and_zeros_stay(m, n, power, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=draw) * torch.rand(m, 1, generator=draw).mul(20).exp() * 2.0**power
    weight[seed % m] = 0
    weight[:, seed % n] = 0
    weight = weight.to(dtype)
    rows, scale = quantize_rows(weight)
    assert rows.dtype == torch.int8 and rows.shape == weight.shape and scale.shape == (m,) and scale.dtype == dtype
    whole = whole_rows(rows, scale)
    # the largest entry may lie beyond 127 by what rounding its scale to the format took from it
    off, most = (whole - weight.float()).abs(), scale.float()[:, None] * (0.5 + 127 * torch.finfo(dtype).eps)
    assert (off <= most).all() and not whole[weight == 0].any()


@pytest.mark.parametrize("dtype, rtol", [*zip(DTYPES, (1e-5, 3e-2))])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_weights_that_it_stands_for(dtype, rtol, shape, bias):
    torch.manual_seed(1)
    layer = Int8Linear(torch.nn.Linear(5, 4, bias=bias, dtype=dtype).requires_grad_(False))
    ours = torch.randn(shape, dtype=dtype, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    outputs, expected = layer(ours), F.linear(theirs, layer.weight, layer.bias)
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs, expected, rtol=rtol, atol=rtol)
    grad = torch.randn_like(expected)
    outputs.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=rtol, atol=rtol)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_until_the_backward_pass_bytes_alone_are_kept():
    """A 16-bit copy of each matrix kept for it would take back what 8 bit gives."""
    stack = torch.nn.Sequential(*(Int8Linear(torch.nn.Linear(256, 256, bias=False).bfloat16()) for _ in range(4)))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = torch.randn(3, 256, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stack(inputs)
    own = {p.untyped_storage().data_ptr() for p in stack.parameters()}
    assert kept.keys() == own and sum(kept.values()) == 4 * (256 * 256 + 2 * 256)


def recipe(base, *overrides):
    """The tiny recipe with a frozen encoder in 8 bit, and a language model in 8 bit under an adapter."""
    ours = ["text_frozen_dtype=int8", "vision_frozen_dtype=int8", "text_adapter.rank=4"]
    changed = load_config(None, [f"model.{text}" for text in ours] + ["optimizer.vision.train=false", *overrides])
    names = ("text_frozen_dtype", "vision_frozen_dtype", "text_adapter")
    model = base.model.model_copy(update={name: getattr(changed.model, name) for name in names})
    return base.model_copy(update={"model": model, "optimizer": changed.optimizer})


@pytest.fixture(params=DTYPES)
def held(request, tiny_config, processor):
    config = recipe(tiny_config)
    torch.manual_seed(0)
    model = build_model(config.model, config.budget, processor, request.param)
    parameter_groups(model, config.optimizer)
    return config, model


def loss_of(model, dtype):
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(10, 60, (1, 40), generator=draw),
        "position_ids": torch.arange(40)[None],
        "pixel_values": torch.randn(2, 3, 48, 64, generator=draw).to(dtype),
        "num_visual_tokens": [4, 4],
        "visual_positions": torch.arange(8),
        **packing(torch.tensor([0, 40], dtype=torch.int32), 40, 40),
    }
    return model(**inputs).logits.float().square().mean()


def test_gradients_reach_adapter_and_projector_and_frozen_weights_stay(held):
    config, model = held
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    model.train()
    loss_of(model, model.dtype).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # at first an adapter's second matrix is zero, so its first has no gradient yet
    wanted = {name: p for name, p in trained.items() if ".lora_A." not in name}
    assert any(".lora_B." in name for name in wanted) and any(name.startswith("projector.") for name in wanted)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in wanted.values())
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in before.items())


def test_every_frozen_linear_layer_but_the_output_is_held_so_and_adapters_are_not(held):
    _, model = held
    for tower in (model.vision_tower, model.language_model):
        plain = [name for name, module in tower.named_modules() if type(module) is torch.nn.Linear]
        assert all(".lora_" in name or name == "lm_head" for name in plain), plain
        assert any(type(module) is Int8Linear for module in tower.modules())
    assert not any(type(module) is Int8Linear for module in model.projector.modules())
    assert all(p.dtype == model.dtype for name, p in model.named_parameters() if not name.endswith("weight_int8"))


def test_frozen_matrices_take_half_the_bytes_of_bf16():
    """Of a layer of the width of real ones, to the byte: a scale per row is all that comes on top."""
    linear = torch.nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16)
    held = sum(p.untyped_storage().nbytes() for p in Int8Linear(linear).parameters())
    assert held == 1024 * 1024 + 2 * 1024 < 0.502 * linear.weight.untyped_storage().nbytes()


def test_what_is_merged_has_the_plain_names_and_the_weights_that_were_trained_over(held, tiny_config, processor):
    config, model = held
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    whole = merged(dict(model.named_parameters()), config.model)
    plain = build_model(tiny_config.model, tiny_config.budget, processor, model.dtype)
    assert whole.keys() == {name for name, _ in plain.named_parameters()}
    assert {tensor.dtype for tensor in whole.values()} == {model.dtype}
    plain.load_state_dict(whole, strict=False)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[model.dtype]
    ours, theirs = loss_of(model.eval(), model.dtype), loss_of(plain.eval(), model.dtype)
    torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=0)


def test_the_estimate_has_the_bytes_that_are_held(held, tiny_config):
    config, model = held
    shaped = shaped_model(config.model, config.budget, model.dtype)
    parameter_groups(shaped, config.optimizer)
    ours, real = ModelSizes.of(shaped, {}), ModelSizes.of(model, {})
    assert ours == real and ours.itemsize == model.dtype.itemsize
    held_bytes = sum(p.untyped_storage().nbytes() for p in dict.fromkeys(model.parameters()))
    assert stage_memory(ours, {}, 0, 1).weights == stage_memory(ours, {}, 2, 4).weights == held_bytes
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    assert checkpoint_bytes(ours) == frozen + 12 * ours.trained
    same = config.model.model_copy(update={"text_frozen_dtype": "same", "vision_frozen_dtype": "same"})
    more = ModelSizes.of(shaped_model(same, config.budget, model.dtype), {})
    numbers = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight_int8"))
    scales = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight_scale"))
    assert more.num_bytes - ours.num_bytes == numbers * (ours.itemsize - 1) - scales * ours.itemsize


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss(held):
    _, model = held
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compile_blocks(compiled, "eager")
    ours, theirs = loss_of(compiled, model.dtype), loss_of(model, model.dtype)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    gradients = dict(compiled.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name].grad, parameter.grad)


def test_a_part_without_linear_layers_is_refused(model):
    for parent in [*model.vision_tower.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, torch.nn.Identity())
    with pytest.raises(UserError, match="^model.vision_frozen_dtype=int8: .* has no linear layer .*; set it to same$"):
        hold_in_int8(model.vision_tower, "model.vision_frozen_dtype")


def test_image_token_rows_are_trained_beside_it(tiny_config, processor):
    """Embedding and output layer are never in 8 bit, so their rows have gradients as ever."""
    config = recipe(tiny_config, "optimizer.train_image_tokens=true")
    model = build_model(config.model, config.budget, processor, torch.float32)
    parameter_groups(model, config.optimizer)
    loss_of(model, torch.float32).backward()
    rows = model.get_input_embeddings().weight.grad.any(dim=1).nonzero().flatten().tolist()
    image = [model.config.image_start_token_id, model.config.image_token_id, model.config.image_end_token_id]
    assert rows and set(rows) <= set(image)
