"""What serving engines that run transformers' classes ask of an export, and a law over all of it: who keeps the contract gets the model's own logits.

The engines themselves need a GPU stack to install; their side is stated here as `EngineLike`, from the sources of vLLM's
transformers modelling backend: fields are cut per image by a count of rows, images are processed apart and cached, replacements
are repeated in a prompt of tokens, and the language model runs on embeddings through an attention of the engine's own.
"""

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenflex.export import export_model
from tokenflex.model import build_model, build_processor


@pytest.fixture(scope="module", params=[1, 4], ids=["whole", "tiled"])
def exported(request, tiny_config, tmp_path_factory):
    config = tiny_config.model.model_copy(update={"max_tiles": request.param})
    torch.manual_seed(11)
    own = build_processor(config, tiny_config.budget)
    model = build_model(config, tiny_config.budget, own, torch.float32)
    folder = tmp_path_factory.mktemp("engine") / "model"
    export_model(model, dict(model.state_dict()), own, folder)
    return folder


@pytest.fixture(scope="module")
def processor(exported):
    return AutoProcessor.from_pretrained(exported)


@pytest.fixture(scope="module")
def base(exported):
    return AutoModel.from_pretrained(exported).eval()


IMAGES = [Image.effect_noise(size, 80).convert("RGB") for size in ((64, 48), (200, 40), (30, 90))]


class EngineLike:
    """An engine's side: all that it reads of the export is what the contract names."""

    def __init__(self, processor, base):
        self.processor, self.base, self.cache = processor, base, {}
        self.token = "".join((processor.image_start_token, processor.image_token, processor.image_end_token))

    def item(self, image, kwargs):
        """Fields and replacement of one image, processed alone and kept under the image and its keywords."""
        key = (image.tobytes(), image.size, tuple(kwargs.items()))
        if key not in self.cache:
            out = self.processor(
                text=self.token, images=[image], return_text_replacement_offsets=True, return_tensors="pt", **kwargs
            )
            ((entry,),) = out.pop("text_replacement_offsets")
            ids = self.processor.tokenizer.encode(entry["replacement"], add_special_tokens=False)
            rows = self.processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width)])
            out.pop("input_ids"), out.pop("attention_mask")
            assert all(len(field) == rows["num_image_patches"][0] for field in out.values()), "not one row per tile"
            self.cache[key] = (dict(out), ids, rows["num_image_patches"][0])
        return self.cache[key]

    def logits(self, prompt, images, per_image, lm_head):
        """Logits at the prompt's tokens, [T, V]."""
        items = [self.item(image, kwargs) for image, kwargs in zip(images, per_image)]
        tokens, ids, replacements = self.processor.tokenizer.encode(prompt, add_special_tokens=False), [], iter(items)
        for token in tokens:
            ids += next(replacements)[1] if token == self.processor.image_token_id else [token]
        ids = torch.tensor(ids)
        fields = {name: torch.cat([item[0][name] for item in items]) for name in items[0][0]}
        features = self.base.get_image_features(fields.pop("pixel_values"), return_dict=True, **fields).pooler_output
        assert [len(tokens) for tokens in features] == [item[1].count(self.processor.image_token_id) for item in items]
        embeds = self.base.get_input_embeddings()(ids)
        embeds[ids == self.processor.image_token_id] = torch.cat(list(features))
        places = torch.arange(len(ids))[None]
        hidden = self.base(
            input_ids=None, inputs_embeds=embeds[None], position_ids=places, use_cache=False, return_dict=False
        )[0]
        return lm_head(hidden)[0], ids


PROMPTS = [
    ([4], None),
    ([12, 4, 6], None),
    ([None, 4, None], None),
    ([4, 4, 4], "images twice"),
]


@pytest.mark.parametrize("counts, twice", PROMPTS, ids=str)
@torch.no_grad()
def test_an_engine_that_keeps_the_contract_gets_the_models_logits(counts, twice, exported, processor, base):
    images = IMAGES[: len(counts)] if not twice else [IMAGES[0]] * len(counts)
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "What <img> is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt = prompt.replace("What <img> is", "What is")  # a prompt of text cannot tell a user's words from a token
    model = AutoModelForImageTextToText.from_pretrained(exported).eval()
    inputs = processor(text=prompt, images=images, num_visual_tokens=[count or 12 for count in counts])
    expected = model(**inputs).logits[0]
    kwargs = [{} if count is None else {"num_visual_tokens": count} for count in counts]
    engine = EngineLike(processor, base)
    logits, ids = engine.logits(prompt, images, kwargs, model.get_output_embeddings())
    assert ids.tolist() == inputs["input_ids"][0].tolist()
    assert len(engine.cache) == (1 if twice else len(counts))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_the_classes_say_what_an_engine_asks(base, exported):
    assert base.is_backend_compatible()
    assert base.get_encoder(modality="image") is base.vision_tower and type(base.vision_tower) is not type(base)
    assert base.get_decoder() is base.language_model.base_model
    assert base.get_input_embeddings() is base.get_decoder().get_input_embeddings()
    full = AutoModelForImageTextToText.from_pretrained(exported)
    assert full.base_model_prefix == "model" and type(full.model) is type(base)
    plan = base.tp_plan
    assert plan["language_model.model.layers.*.self_attn.q_proj"] == "colwise" and base.supports_pp_plan
    children = {name for name, _ in base.named_children()}
    assert {name.partition(".")[0] for name in full.state_dict()} == children, (
        "stored names are the base model's children"
    )


def test_every_layer_attends_through_the_engines_attention(exported, processor):
    """An engine finds its own cache for each layer by what it hands to the model's call."""
    seen = []

    def attention(module, query, key, value, mask, attention_instances=None, scaling=None, **kwargs):
        seen.append(attention_instances[module.layer_idx])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling, **kwargs)

    base = AutoModel.from_pretrained(exported).eval()
    ALL_ATTENTION_FUNCTIONS["engine_like"] = attention
    try:
        base.config.get_text_config()._attn_implementation = "engine_like"
        base(torch.arange(3, 9)[None], attention_instances={0: "first", 1: "second"}, use_cache=False)
    finally:
        del ALL_ATTENTION_FUNCTIONS["engine_like"]
    assert seen == ["first", "second"]


def test_what_is_foretold_is_what_comes(processor):
    """Engines plan memory by `_get_num_multimodal_tokens` and then hold the processor to it."""
    sizes = [(image.height, image.width) for image in IMAGES]
    for kwargs in ({}, {"num_visual_tokens": 4}, {"num_visual_tokens": (2, 3)}, {"max_tiles": 2}, {"thumbnail": False}):
        told = processor._get_num_multimodal_tokens(image_sizes=sizes, **kwargs)
        out = processor(
            text=processor.image_token * 3, images=IMAGES, return_text_replacement_offsets=True, **kwargs
        )  # fmt: skip
        runs = [entry["replacement"].count(processor.image_token) for entry in out["text_replacement_offsets"][0]]
        assert told["num_image_tokens"] == runs
        assert sum(told["num_image_patches"]) == len(out["pixel_values"]) == len(out["visual_sides"])
    largest = processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    for count in (4, 12):  # those it was trained at: profiling, which names none, must see the largest
        told = processor._get_num_multimodal_tokens(image_sizes=sizes, num_visual_tokens=count)["num_image_tokens"]
        assert all(a >= b for a, b in zip(largest, told))


def test_replacements_turn_the_prompt_into_what_was_tokenized(processor):
    tag = processor.image_start_token + processor.image_token + processor.image_end_token
    for text in (f"a {tag} b {tag}{tag}", f"{processor.image_token} c {tag} d {processor.image_token}"):
        out = processor(
            text=text, images=IMAGES, num_visual_tokens=[4, 6, 12], return_text_replacement_offsets=True
        )  # fmt: skip
        (entries,) = out["text_replacement_offsets"]
        new = text
        for entry in reversed(entries):
            begin, end = entry["span"]
            assert text[begin:end] == entry["text"] == processor.image_token
            new = new[:begin] + entry["replacement"] + new[end:]
        for entry in entries:
            assert new[slice(*entry["new_span"])] == entry["replacement"]
        assert processor.tokenizer.encode(new, add_special_tokens=False) == out["input_ids"][0].tolist()


def test_a_count_is_also_a_setting_of_the_processor(exported):
    """Engines load the processor anew with a request's keywords."""
    processor = AutoProcessor.from_pretrained(exported, num_visual_tokens=4)
    told = processor._get_num_multimodal_tokens(image_sizes=[(48, 64)])
    assert told["num_image_tokens"] == [4] and told["num_image_patches"] == [1]
