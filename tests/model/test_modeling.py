"""The model with every encoder family, and generation at any number of visual tokens."""

import json
import logging
import re
import subprocess
import sys

import pytest
import torch
from conftest import STRANGER
from PIL import Image

from tokenflex.config import ModelConfig
from tokenflex.errors import UserError
from tokenflex.model import build_model
from tokenflex.model.modeling_tokenflex import image_runs, resize_image_runs, splice
from tokenflex.model.vision import patch_features, patch_grid

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
OWN_WIDTH = {name: value for name, value in SMALL.items() if name != "intermediate_size"}  # dinov2 has a ratio
ENCODERS = {
    "siglip": {"model_type": "siglip_vision_model", **SMALL, "image_size": 64, "patch_size": 8},
    "siglip2": {"model_type": "siglip2_vision_model", **SMALL, "patch_size": 8, "num_patches": 64},
    "clip": {"model_type": "clip_vision_model", **SMALL, "image_size": 64, "patch_size": 8},
    "dinov2": {"model_type": "dinov2", **OWN_WIDTH, "image_size": 64, "patch_size": 8},
    "dinov2 with registers": {"model_type": "dinov2_with_registers", **OWN_WIDTH, "image_size": 64, "patch_size": 8},
    "internvit": {"model_type": "internvl_vision", **SMALL, "image_size": [64, 64], "patch_size": [8, 8]},
    "bit": {"model_type": "bit", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4},
    "convnext": {
        "model_type": "convnextv2",
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_stages": 2,
        "patch_size": 4,
    },
}


def build(tiny_config, processor, **section):
    torch.manual_seed(0)
    model = tiny_config.model.model_copy(update=section)
    return build_model(model, tiny_config.budget, processor, torch.float32).eval()


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("size", [(64, 64), (48, 64)])
def test_every_encoder_gives_its_grid_row_by_row(encoder, size, tiny_config, processor):
    model = build(tiny_config, processor, vision=ENCODERS[encoder], image_size=size)
    assert model.patch_grid == (size[0] // 8, size[1] // 8)
    rows, columns = model.patch_grid
    pixels = torch.zeros(2, 3, *size)
    base = patch_features(model.vision_tower, pixels)
    assert base.shape == (2 * rows * columns, 32)
    # light up one patch of the second image: the strongest change is in that patch's row of the features
    pixels[1, :, 16:24, 40:48] = 3.0
    features = patch_features(model.vision_tower, pixels)
    change = (features - base).norm(dim=-1)
    assert change[: rows * columns].max() == 0
    if encoder in ("convnext", "bit"):  # wide kernels spread the change; their own map says where each row belongs
        assert torch.equal(
            features.view(2, rows, columns, 32), model.vision_tower(pixels).last_hidden_state.permute(0, 2, 3, 1)
        )
    else:
        assert change.argmax() == rows * columns + 2 * columns + 5


@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name != "bit"])  # it has convolutions alone
def test_every_encoder_sees_the_same_in_8_bit(encoder, tiny_config, processor):
    """Also one that asks its first layer for its weight's format, and would cut pixels to whole numbers if it were told of bytes."""
    section = {"vision": ENCODERS[encoder], "image_size": (64, 64)}
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain, ours = (
        patch_features(build(tiny_config, processor, vision_frozen_dtype=dtype, **section).vision_tower, pixels)
        for dtype in ("same", "int8")
    )
    off = (ours - plain).norm() / plain.norm()
    assert 0 < off < 0.02


@pytest.mark.parametrize("num_stages, stride", [(1, 4), (2, 8), (3, 16)])
def test_an_encoder_in_stages_halves_its_map_after_the_first(num_stages, stride):
    """A single stage too, as the quick start's encoder has it: the stem alone takes a factor of 4."""
    from transformers import BitConfig, BitModel

    sizes = {"hidden_sizes": [16] * num_stages, "depths": [1] * num_stages}
    tower = BitModel(BitConfig(embedding_size=16, num_groups=4, layer_type="preactivation", **sizes)).eval()
    assert patch_grid(tower.config, 64, 96) == (64 // stride, 96 // stride)
    assert patch_features(tower, torch.zeros(2, 3, 64, 96)).shape == (2 * 64 * 96 // stride**2, 16)


def test_sine2d_places_are_distinct_and_average_to_the_same_place_at_any_count():
    from tokenflex.model.pooling import pool_grid
    from tokenflex.model.vision import sine2d

    places = sine2d(16, 16, 64)
    assert places.shape == (256, 64) and places.abs().max() <= 1
    assert torch.cdist(places, places).fill_diagonal_(9).min() > 0.05
    coarse = pool_grid(places.view(1, 16, 16, 64), (4, 4))[0]
    fine = pool_grid(places.view(1, 16, 16, 64), (8, 8))[0]
    nearest = torch.cdist(fine, coarse).argmin(1).view(8, 8)  # each fine token is nearest to the coarse one around it
    assert torch.equal(nearest, torch.arange(16).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_images_that_are_no_whole_number_of_patches_are_refused(tiny_config, processor):
    config = build(tiny_config, processor).config.vision_config
    with pytest.raises(ValueError, match="50 x 64 pixels is not a whole number of patches.*multiples of 8"):
        patch_grid(config, 50, 64)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_config, processor):
    from tokenflex.export import export_model

    model = build(tiny_config, processor)
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_model(model, {**dict(model.named_parameters()), **dict(model.named_buffers())}, processor, folder)
    return folder, model


def ask(processor, text="What is it?", images=1, **kwargs):
    content = [{"type": "image", "image": Image.effect_noise((64, 48), 90)}] * images + [{"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, **kwargs
    )


ANSWERS = """
inputs = torch.load(rest[0], weights_only=True)
torch.save(model(**inputs).logits.detach(), folder + ".logits")
messages = [{"role": "user", "content": [{"type": "image", "url": folder + ".png"}, {"type": "text", "text": "What?"}]}]
prompt = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
for count in (12, 7, 30):
    answer = model.generate(**prompt, num_visual_tokens=count, max_new_tokens=3, do_sample=False)
    print(json.dumps({"count": count, "new": answer[0, prompt["input_ids"].shape[1]:].tolist()}))
print(json.dumps({"class": type(model).__module__, "trained": model.config.trained_num_visual_tokens}))
"""


def test_export_reloads_in_a_clean_process_with_the_same_logits(exported, processor, tmp_path):
    """A process in which this package cannot be imported, with the Auto classes alone."""
    folder, model = exported
    model.language_model.set_attn_implementation("sdpa")
    inputs = dict(ask(processor, images=2, num_visual_tokens=[12, 5]))
    torch.save(inputs, tmp_path / "inputs.pt")
    Image.effect_noise((64, 48), 90).save(f"{folder}.png")
    (tmp_path / "stranger.py").write_text(STRANGER + ANSWERS)
    command = [sys.executable, tmp_path / "stranger.py", str(folder), str(tmp_path / "inputs.pt")]
    end = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert end.returncode == 0, end.stderr[-3000:]
    with torch.no_grad():
        torch.testing.assert_close(torch.load(f"{folder}.logits"), model(**inputs).logits, rtol=0, atol=1e-6)
    lines = [json.loads(line) for line in end.stdout.splitlines()]
    assert [line["count"] for line in lines[:3]] == [12, 7, 30]
    assert lines[3]["class"].startswith("transformers_modules") and lines[3]["trained"] == [4, 12]
    assert all(end.stderr.count(f"num_visual_tokens={count} was not trained") == 1 for count in (5, 7, 30))


def test_generate_at_a_count_equals_a_prompt_built_for_it(exported, processor):
    _, model = exported
    model.language_model.set_attn_implementation("sdpa")
    torch.manual_seed(0)
    wide = ask(processor, images=2, num_visual_tokens=[12, 12])
    narrow = {
        **wide,
        **{k: v for k, v in ask(processor, images=2, num_visual_tokens=[6, 9]).items() if k != "pixel_values"},
    }
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    built = model.generate(**narrow, **options)
    asked = model.generate(**wide, num_visual_tokens=[6, 9], **options)
    assert torch.equal(asked[:, : wide["input_ids"].shape[1]], wide["input_ids"])
    assert torch.equal(asked[:, wide["input_ids"].shape[1] :], built[:, narrow["input_ids"].shape[1] :])
    beams = model.generate(**wide, num_visual_tokens=6, num_beams=2, num_return_sequences=2, max_new_tokens=3)
    assert beams.shape[0] == 2


def test_a_batch_generates_what_its_prompts_do_alone(exported, processor):
    _, model = exported
    model.language_model.set_attn_implementation("sdpa")
    image = Image.effect_noise((64, 48), 90)
    talk = lambda text, images: [
        {"role": "user", "content": [{"type": "image", "image": image}] * images + [{"type": "text", "text": text}]}
    ]
    talks = [talk("a?", 1), talk("and a much longer question?", 2), talk("no image here", 0)]
    render = lambda c: processor.apply_chat_template(c, tokenize=True, add_generation_prompt=True, num_visual_tokens=6)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = render(talks)
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, one in zip(together, talks):
        inputs = render(one)
        assert torch.equal(row, model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :])


def encoder_calls(model):
    """(the numbers of tiles that the encoder is called with from now on, the hook to remove)."""
    calls = []
    hook = model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    return calls, hook


def test_features_stand_for_their_images_at_every_count(exported, processor):
    """Answers, logits, beams and batches of uneven prompts are those of the pixels, and the encoder has run once."""
    _, model = exported
    model.language_model.set_attn_implementation("sdpa")
    wide = ask(processor, images=2, num_visual_tokens=[12, 12])
    wanted = {
        count: model.generate(**wide, num_visual_tokens=count, num_beams=2, max_new_tokens=4, do_sample=False)
        for count in (4, 7, (2, 5), 30)
    }
    with torch.no_grad():
        logits = model(**wide).logits
        calls, hook = encoder_calls(model)
        once = {**wide, "pixel_values": model.encode_images(wide["pixel_values"])}
        assert torch.equal(model(**once).logits, logits)
    for count, answer in wanted.items():
        again = model.generate(**once, num_visual_tokens=count, num_beams=2, max_new_tokens=4, do_sample=False)
        assert torch.equal(again, answer), count
    hook.remove()
    assert calls == [2]


def test_detail_of_pooling_travels_and_takes_a_plan(tiny_config, processor, tmp_path):
    from tokenflex.export import export_model
    from tokenflex.model import TokenFlexForConditionalGeneration

    model = build(tiny_config, processor, pooling_detail="max")
    model.projector.detail_share.data.uniform_(0, 1)
    model.language_model.set_attn_implementation("sdpa")
    inputs = ask(processor, images=2, num_visual_tokens=[12, 6])
    with torch.no_grad():
        wanted = model(**inputs).logits
        model.projector.backend = "kernels"
        plan = model.projector.plan_maker(model.patch_grid, torch.empty(0))([12, 6])
        planned = model(**inputs, num_visual_tokens=[12, 6], pool_plan=plan).logits
    torch.testing.assert_close(planned, wanted, rtol=1e-4, atol=1e-5)
    export_model(
        model, {**dict(model.named_parameters()), **dict(model.named_buffers())}, processor, tmp_path / "model"
    )
    again = TokenFlexForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert again.config.pooling_detail == "max" and torch.equal(
        again.projector.detail_share, model.projector.detail_share
    )
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, wanted, rtol=1e-5, atol=1e-6)


def test_features_of_another_grid_are_refused(exported, processor):
    _, model = exported
    inputs = ask(processor)
    for shape in ((1, 7, 32), (1, 64, 31)):
        with pytest.raises(ValueError, match="came for images; wanted .* patches of width 32, as encode_images gives"):
            model(**{**inputs, "pixel_values": torch.zeros(shape)})


def test_a_generator_encodes_an_image_once_and_answers_as_ever(exported, processor, tmp_path):
    from tokenflex.infer.generate import Generator

    folder, _ = exported
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        Image.effect_noise((64, 48), 60 + 10 * number).save(paths[-1])
    asked = [
        ("a?", paths[:1], 4),
        ("b?", paths[:2], 12),
        ("a?", paths[:1], 12),
        ("c", paths[::-1], [4, 6, 9]),
        ("d", [], None),
    ]
    wanted = [Generator(folder, cached_images=0)(*question, max_new_tokens=4) for question in asked]
    cached = Generator(folder, cached_images=2)
    calls, hook = encoder_calls(cached.model)
    assert [cached(*question, max_new_tokens=4) for question in asked] == wanted
    assert calls == [1, 1, 1]  # each image once: the second with the first there, the third
    cached("e", paths[:1], 12, max_new_tokens=2)
    assert calls == [1, 1, 1]  # of the three, the two that were used last are kept
    cached("f", paths[2:] * 2, 4, max_new_tokens=2)
    hook.remove()
    assert calls == [1, 1, 1, 1]  # and one that comes twice is encoded once


def test_an_untrained_count_is_warned_of_once(exported, processor, caplog):
    _, model = exported
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            model._sides(11, [1], None)
            model._sides(12, [1], None)
    said = [record.getMessage() for record in caplog.records if "was not trained" in record.getMessage()]
    assert len(said) == 1 and "num_visual_tokens=11" in said[0] and "[4, 12]" in said[0]


@pytest.mark.parametrize("count", [0, -1, 1.5, (0, 2)])
def test_counts_that_are_none_are_refused(exported, count):
    with pytest.raises(ValueError, match="num_visual_tokens|must hold two positive"):
        exported[1]._sides([count], [1], None)


def test_mismatched_counts_are_named_with_both_numbers(exported, processor):
    _, model = exported
    inputs = ask(processor, num_visual_tokens=12)
    with pytest.raises(ValueError, match="12 image placeholders but the images gave 9 visual tokens"):
        model(**inputs, num_visual_tokens=9)
    two = {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
    with pytest.raises(ValueError, match=r"num_tiles \[1\] adds up to 1 but 2 tiles came"):
        model(**two)
    two["num_tiles"] = torch.tensor([1, 1])
    with pytest.raises(ValueError, match="2 images came with 1 runs"):
        model(**two)


def test_splice_and_runs():
    embeds, rows = torch.zeros(2, 4, 3), torch.arange(6.0).view(2, 3)
    out = splice(embeds, rows, torch.tensor([1, 6]))
    assert torch.equal(out[0, 1], rows[0]) and torch.equal(out[1, 2], rows[1]) and out.count_nonzero() == 5
    ids = torch.tensor([[9, 5, 5, 1, 5], [0, 5, 1, 2, 3]])
    assert image_runs(ids, 5) == [(0, 1, 2), (0, 4, 1), (1, 1, 1)]
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    resized, mask = resize_image_runs(ids, mask, [1, 2, 3], 5, pad_token_id=0)
    assert resized.tolist() == [[0, 9, 5, 1, 5, 5], [5, 5, 5, 1, 2, 3]]
    assert mask.tolist() == [[0, 1, 1, 1, 1, 1], [1] * 6]


def test_pretrained_parts_keep_their_weights(tmp_path, tiny_config, processor):
    """Composed from two local folders: every weight is the folder's, none was initialised over."""
    source = build(tiny_config, processor)
    source.vision_tower.save_pretrained(tmp_path / "vision")
    source.language_model.save_pretrained(tmp_path / "text")
    composed = build(tiny_config, processor, vision=str(tmp_path / "vision"), text=str(tmp_path / "text"))
    for part in ("vision_tower", "language_model"):
        theirs, ours = getattr(source, part).state_dict(), getattr(composed, part).state_dict()
        assert theirs.keys() == ours.keys()
        for name in theirs:
            assert torch.equal(theirs[name], ours[name]), name


def test_going_on_from_a_folder_runs_no_code_of_that_folder(exported, tmp_path, tiny_config):
    """An exported folder brings code for others; this package has its own and must not run what lies there."""
    import shutil

    from tokenflex.model import build_processor

    shutil.copytree(exported[0], tmp_path / "model")
    for path in (tmp_path / "model").glob("*.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + path.read_text())
    section = tiny_config.model.model_copy(update={"init_from": str(tmp_path / "model")})
    processor = build_processor(section, tiny_config.budget)
    build_model(section, tiny_config.budget, processor, torch.float32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key, value", [
    ("pooling_mode", "resize"), ("pooling_detail", "max"), ("vision_position_embedding", "sine2d"), ("image_size", (48, 48)), ("projector_multiplier", 2),
    ("vision_feature_layer", -2),
])  # fmt: skip
def test_a_recipe_that_says_otherwise_of_the_model_it_goes_on_from_is_refused(
    key, value, exported, tiny_config, processor
):
    section = tiny_config.model.model_copy(update={"init_from": str(exported[0]), key: value})
    with pytest.raises(UserError, match=f"model.{key}=.*the model of model.init_from=.* has "):
        build_model(section, tiny_config.budget, processor, torch.float32)


@pytest.mark.parametrize("section, part", [
    ({"vision": "/nowhere/siglip"}, "model.vision: /nowhere/siglip is no folder here, and no hub id either"),
    ({"vision": {"model_type": "resnext"}}, "model.vision: model_type is 'resnext'"),
    ({"image_size": (50, 64)}, "model.image_size: an image of 50 x 64"),
    ({"text": {"model_type": "qwen3", "hidden_size": "wide"}}, "model.text: "),
    ({"text": {"model_type": "t5"}}, "model.text: t5 is no causal language model"),
    ({"text": {"model_type": "qwen3", "num_attention_heads": 0}}, "model.text.num_attention_heads is 0; wanted a number above 0"),
])  # fmt: skip
def test_a_part_that_cannot_be_built_is_named(section, part, tiny_config, processor, corpus):
    from tokenflex.model import build_processor

    model = ModelConfig(**{**tiny_config.model.model_dump(), **section})
    with pytest.raises(UserError, match=part):
        build_processor(model, tiny_config.budget)
        build_model(model, tiny_config.budget, processor, torch.float32)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, tiny_config, processor):
    from safetensors.torch import load_file, save_file

    build(tiny_config, processor).vision_tower.save_pretrained(tmp_path / "vision")
    weights = load_file(tmp_path / "vision" / "model.safetensors")
    weights.pop(sorted(weights)[3])
    save_file(weights, tmp_path / "vision" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 weights are missing or of another shape"):
        build(tiny_config, processor, vision=str(tmp_path / "vision"))


@pytest.mark.parametrize(("tokens", "said"), [
    (("<img>", "<img>", "</img>"), "'<img>' is there twice"), (("<img>", "", "</img>"), "'' is empty"),
    (("<img>", "<|im_end|>", "</img>"), "'<|im_end|>' is the tokenizer's eos_token"),
    (("<img>", "<|endoftext|>", "</img>"), "'<|endoftext|>' is the tokenizer's pad_token"),
])  # fmt: skip
def test_image_tokens_that_mean_something_else_are_refused(tokens, said, tiny_config):
    from tokenflex.model import build_processor

    wanted = tiny_config.model.model_copy(update={"image_tokens": tokens, "add_image_tokens": True})
    with pytest.raises(UserError, match=re.escape(f"model.image_tokens: {said}")):
        build_processor(wanted, tiny_config.budget)


def test_missing_image_tokens_are_added_only_when_asked(tiny_config, corpus, processor):
    from tokenflex.model import build_processor

    wanted = tiny_config.model.model_copy(update={"image_tokens": ("<pic>", "<PIC>", "</pic>")})
    with pytest.raises(
        UserError, match=r"lacks the image tokens \['<pic>', '<PIC>', '</pic>'\].*add_image_tokens=true"
    ):
        build_processor(wanted, tiny_config.budget)
    added = wanted.model_copy(update={"add_image_tokens": True})
    grown = build_processor(added, tiny_config.budget)
    model = build(tiny_config, grown, image_tokens=added.image_tokens)
    assert model.get_input_embeddings().num_embeddings >= len(grown.tokenizer)
    assert (ask(grown, num_visual_tokens=4)["input_ids"] == grown.image_token_id).sum() == 4
