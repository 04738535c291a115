"""What SGLang's transformers backend asks of an export, point by point: what holds, and what does not (docs/serving.md says both).

SGLang needs a GPU stack to install; its side is stated here from its sources: the class is found by `auto_map`, built on the meta
device with real buffers, given SGLang's attention, and run over several requests packed into one row; the processor is called with
a prompt's text and its images, and of its fields those with known names are kept.
"""

import re
from contextlib import contextmanager

import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenflex.export import export_model
from tokenflex.model import build_model, build_processor

PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "model.": "model.",
    "lm_head.": "lm_head.",
    "": "model.",
}
"""Those of SGLang's renamings that a name of an export can meet; the longest that fits is taken, once."""
IMAGE_FIELDS = (
    "pixel_values", "image_sizes", "image_grid_thw", "image_attention_mask", "image_emb_mask", "images_spatial_crop", "images_crop",
    "has_local_crops", "has_images", "tgt_size", "image_grid_hws", "aspect_ratio_ids", "aspect_ratio_mask", "num_patches",
    "patch_pixel_values", "block_sizes", "grid_thws",
)  # fmt: skip
"""Fields of a processor that reach the model; others are dropped without a word."""
STYLES = (
    "colwise", "colwise_rep", "rowwise", "rowwise_rep", "replicate", "colwise_gather_output", "rowwise_split_input",
    "replicated_with_grad_allreduce", "isolated", "local",
)  # fmt: skip
"""Those of the styles of a tensor-parallel plan that SGLang knows which transformers' dense language models use."""
ATTENTION = "sglang_like"
IMAGES = [Image.effect_noise(size, 80).convert("RGB") for size in ((64, 48), (200, 40), (30, 90))]


def exported(tiny_config, folder, max_tiles=1, **budget):
    model_config = tiny_config.model.model_copy(update={"max_tiles": max_tiles})
    budget = tiny_config.budget.model_copy(update=budget)
    torch.manual_seed(11)
    own = build_processor(model_config, budget)
    model = build_model(model_config, budget, own, torch.float32)
    export_model(model, dict(model.state_dict()), own, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_config, tmp_path_factory):
    return exported(tiny_config, tmp_path_factory.mktemp("sglang") / "model")


@pytest.fixture(scope="module")
def full(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@contextmanager
def parameters_on_meta():
    """As SGLang builds a model: no parameter has memory, every buffer its values."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def base_model(folder):
    """The base model, built from the configuration alone with another attention set in the text's part of it."""
    config = AutoConfig.from_pretrained(folder)
    config.get_text_config()._attn_implementation = ATTENTION
    with parameters_on_meta():
        return AutoModel.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def built(folder):
    ALL_ATTENTION_FUNCTIONS[ATTENTION] = paged_attention
    yield base_model(folder)
    del ALL_ATTENTION_FUNCTIONS[ATTENTION]


def paged_attention(
    module, query, key, value, mask, scaling=None, attention_instances=None, forward_batch=None, **kwargs
):
    """An attention that keeps the requests of a packed row apart by the engine's own batch."""
    assert mask is None, "SGLang refuses a mask"
    assert query.dim() == 4 and len(query) == 1 and not kwargs.get("dropout")
    forward_batch["layers"].append(attention_instances[str(module.layer_idx)])
    parts = zip(*(part.split(forward_batch["lengths"], dim=2) for part in (query, key, value)))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    done = [sdpa(q, k, v, is_causal=True, scale=scaling, enable_gqa=True) for q, k, v in parts]
    return torch.cat(done, dim=2).transpose(1, 2), None


def renamed(name):
    prefix = max((prefix for prefix in PREFIXES if name.startswith(prefix)), key=len)
    return PREFIXES[prefix] + name.removeprefix(prefix)


def test_the_class_is_found_by_the_map_of_the_configuration(folder, full):
    config = AutoConfig.from_pretrained(folder)
    (architecture,) = config.architectures
    assert not hasattr(transformers, architecture), "a class of transformers' own would be taken in its place"
    classes = {name: get_class_from_dynamic_module(target, str(folder)) for name, target in config.auto_map.items()}
    assert classes["AutoModel"].__name__ == "TokenFlexModel" and classes["AutoModel"].is_backend_compatible()
    assert config.get_text_config() is not config  # which is what makes it multimodal there
    for name in ("image_token_id", "image_start_token_id", "image_end_token_id"):
        assert getattr(config, name) == getattr(AutoProcessor.from_pretrained(folder), name)


def test_it_is_built_without_weights_and_with_every_buffer(built):
    assert all(parameter.is_meta for parameter in built.parameters())
    assert not any(buffer.is_meta for buffer in built.buffers())


def test_the_languages_attention_is_told_from_the_visions_by_its_configuration(built):
    """By identity: a copy of the text's configuration would leave SGLang without a layer."""
    text = built.config.get_text_config()
    attentions = [module for module in built.modules() if hasattr(module, "is_causal")]
    layers = [module.layer_idx for module in attentions if getattr(module, "config", text) is text]
    assert layers == list(range(text.num_hidden_layers)) and len(attentions) > len(layers)


def test_embedding_and_head_are_plain_and_of_the_configurations_vocabulary(full):
    embedding, head, text = full.get_input_embeddings(), full.get_output_embeddings(), full.config.get_text_config()
    assert type(embedding).forward is nn.Embedding.forward and head.bias is None
    assert embedding.weight.shape == head.weight.shape == (text.vocab_size, text.hidden_size)


def test_plans_name_linear_layers_in_known_styles_and_one_list_of_layers(built):
    linear = [name for name, module in built.named_modules() if isinstance(module, nn.Linear)]
    styles = {style for pattern, style in built.tp_plan.items() if any(re.fullmatch(pattern, name) for name in linear)}
    assert styles and styles <= set(STYLES)
    parts = dict(built.named_modules())
    lists = [name for name in built._pp_plan if isinstance(parts.get(name), nn.ModuleList)]
    assert lists == ["language_model.model.layers"] and set(built._pp_plan) <= parts.keys()


def kept(processor, text, images):
    """(tokens, fields that reach the model) of a prompt, as SGLang calls the processor."""
    out = processor(text=text, images=images, return_tensors="pt")
    return out["input_ids"].flatten(), {name: value for name, value in out.items() if name in IMAGE_FIELDS}


def prompt(processor, images, question):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.no_grad()
def test_requests_that_are_packed_into_a_row_get_each_its_own_logits(folder, full, processor, built):
    """Three requests, one of them without an image: all pixels go to one call, beside SGLang's batch and its layers' caches."""
    requests = [(IMAGES[:2], "What is it?"), ([], "Hello"), (IMAGES[2:], "And this?")]
    inputs = [kept(processor, prompt(processor, images, question), images or None) for images, question in requests]
    lengths = [len(ids) for ids, _ in inputs]
    batch = {"lengths": lengths, "layers": []}
    base = base_model(folder)
    base.load_state_dict(full.state_dict(), assign=True)
    hidden = base(
        input_ids=torch.cat([ids for ids, _ in inputs])[None],
        pixel_values=torch.cat([fields["pixel_values"] for _, fields in inputs if fields]),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        inputs_embeds=None,
        use_cache=False,
        return_dict=False,
        forward_batch=batch,
        attention_instances={"0": "first", "1": "second"},
    )[0][0]
    assert batch["layers"] == ["first", "second"]
    for (ids, fields), own in zip(inputs, full.get_output_embeddings()(hidden).split(lengths)):
        torch.testing.assert_close(own, full(ids[None], **fields).logits[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_features_are_as_many_as_the_placeholders(full, processor):
    ids, fields = kept(processor, prompt(processor, IMAGES, "What?"), IMAGES)
    output = full.model.get_image_features(**fields)
    assert len(torch.cat(output.pooler_output)) == int((ids == full.config.image_token_id).sum()) == 36


def test_the_count_is_the_servers(folder):
    """SGLang hands no keyword of a request on: what is set beside the weights is what every image gets."""
    processor = AutoProcessor.from_pretrained(folder, num_visual_tokens=4)
    ids, _ = kept(processor, prompt(processor, IMAGES[:1], "What?"), IMAGES[:1])
    assert int((ids == processor.image_token_id).sum()) == 4


def test_what_sglang_cannot_load_is_what_the_page_says(full, built):
    """Its renamings take a text part without its output layer for granted: the page names this, and nothing else is lost."""
    has = {f"model.{name}" for name, _ in built.named_parameters(remove_duplicate=False)} | {"lm_head.weight"}
    stored = [name for name, _ in full.named_parameters(remove_duplicate=False)]
    lost = {name for name in stored if renamed(name) not in has}
    assert lost == {name for name in stored if name.startswith("language_model.model.")}
    assert {renamed(name) for name in stored if name.startswith("projector.")} <= has
    assert has - {renamed(name) for name in stored} - {f"model.{name}" for name in lost} == {
        "model.language_model.lm_head.weight"
    }


@pytest.mark.parametrize("how", [{"max_tiles": 4}, {"sides": "aspect"}], ids=str)
@torch.no_grad()
def test_an_export_with_tiles_or_rectangles_refuses_what_sglang_leaves_of_its_fields(how, tiny_config, tmp_path):
    """It drops `num_tiles` and `tile_sizes`; an answer without them would be to other images."""
    folder = exported(tiny_config, tmp_path / "model", **how)
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    ids, fields = kept(processor, prompt(processor, IMAGES, "What?"), IMAGES)
    with pytest.raises(ValueError, match="tiles|images came with"):
        model(ids[None], **fields)


def test_a_template_that_writes_images_makes_the_processors_prompt(processor):
    """SGLang's chat route renders by the tokenizer, images as bare items; one whose template knows text alone loses them there."""
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    rendered = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == prompt(processor, IMAGES[:2], "What?")
