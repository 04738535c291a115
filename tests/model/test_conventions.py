"""Hugging Face's conventions, as its own tools meet them: one loss however a step is cut up, generation in every mode, any form of input."""

import copy

import pytest
import torch
import zoo
from transformers import CompileConfig, DynamicCache, Trainer, TrainingArguments

from tokenflex.model import TokenFlexConfig, TokenFlexForConditionalGeneration, TokenFlexModel
from tokenflex.model.modeling_tokenflex import CACHE

IMAGE, START, END = 4, 3, 5


def tiny(**text):
    config = TokenFlexConfig(
        zoo.PLAIN_VISION,
        {**zoo.PLAIN_TEXT, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 2, **text},
        image_height=48,
        image_width=64,
        image_start_token_id=START,
        image_token_id=IMAGE,
        image_end_token_id=END,
        trained_num_visual_tokens=(4, 6),
    )
    torch.manual_seed(0)
    return zoo.sharpened(TokenFlexForConditionalGeneration(config)).eval()


def prompts(counts, generator=None):
    """Rows of one length, row r with an image for each of `counts[r]`: input_ids, attention_mask, pixel_values."""
    generator = generator or torch.Generator().manual_seed(1)
    rows = []
    for some in counts:
        row = [torch.randint(10, 300, (3,), generator=generator)]
        for count in some:
            row += [torch.tensor([START, *[IMAGE] * count, END]), torch.randint(10, 300, (2,), generator=generator)]
        rows.append(torch.cat(row))
    length = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(length - len(row), dtype=torch.long), row]) for row in rows])
    pixels = torch.rand(sum(map(len, counts)), 3, 48, 64, generator=generator) * 2 - 1
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_trainers_loss_is_one_however_a_step_is_cut_up(accumulation, tmp_path):
    """Rows of very different numbers of labels: the mean over all tokens, not over micro-steps, and not their sum."""
    rows = []
    for number, start in enumerate([1, 6, 9, 10]):
        row = {name: value[0] for name, value in prompts([[4]], torch.Generator().manual_seed(number)).items()}
        row["pixel_values"] = row["pixel_values"][None]
        row["labels"] = torch.cat([torch.full((start,), -100), row["input_ids"][start:]])
        rows.append(row)
    collate = lambda some: {
        name: torch.cat([x[name] if name == "pixel_values" else x[name][None] for x in some]) for name in some[0]
    }
    model = tiny().train()
    with torch.no_grad():
        wanted = model(**collate(rows)).loss.item()
    settings = TrainingArguments(
        output_dir=tmp_path, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
        max_steps=1, learning_rate=0.0, report_to=[], use_cpu=True, logging_steps=1, save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate)
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - wanted) < 1e-4


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}])  # fmt: skip
def test_every_way_of_generating_takes_images(options):
    model = tiny()
    inputs = prompts([[4, 6]] if "prompt_lookup_num_tokens" in options else [[4], [], [6, 4]])
    new = model.generate(**inputs, max_new_tokens=4, eos_token_id=None, **options)
    assert new.shape[1] == inputs["input_ids"].shape[1] + 4
    if "num_beams" in options:  # each row alone, with its own images
        place = 0
        for row, number in enumerate([1, 0, 2]):
            alone = {name: inputs[name][row : row + 1] for name in ("input_ids", "attention_mask")}
            if number:
                alone["pixel_values"] = inputs["pixel_values"][place : place + number]
            place += number
            one = model.generate(**alone, max_new_tokens=4, eos_token_id=None, **options)
            assert torch.equal(one[0], new[row]), row


@pytest.mark.parametrize("count", [None, 9])
def test_an_assistant_changes_nothing_but_the_speed(count):
    model, inputs = tiny(), prompts([[4]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "num_visual_tokens": count}
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, assistant_model=copy.deepcopy(model)), plain)
    other = zoo.sharpened(copy.deepcopy(model), seed=9)
    assert torch.equal(model.generate(**inputs, **options, assistant_model=other), plain)


def test_without_a_cache_the_text_is_the_same():
    model, inputs = tiny(), prompts([[4], [6]])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))
    assert model(**inputs, use_cache=False).past_key_values is None


def test_embeddings_in_place_of_ids_take_images_too():
    model, inputs = tiny(), prompts([[4, 6], [6]])
    wanted = model(**inputs).logits
    ids = inputs.pop("input_ids")
    ours = model(**inputs, inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(ours, wanted)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(**inputs)


def test_beams_over_embeddings_keep_each_rows_images():
    """Without ids the images of a row are found by the embedding of their placeholders, as with ids."""
    model, inputs = tiny(), prompts([[4], [6, 4]])
    wanted = model.generate(**inputs, num_beams=2, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(
        model.generate(inputs_embeds=embeds, **inputs, num_beams=2, max_new_tokens=4, do_sample=False), wanted
    )


@pytest.mark.parametrize("as_embeds", [False, True])
def test_a_prompt_whose_begin_is_in_the_cache_runs_the_rest(as_embeds):
    """As transformers goes on with a chat: the whole prompt and the cache of what came before. Only new images are encoded."""
    model, inputs = tiny(), prompts([[4, 6, 4]])
    ids, pixels, length = inputs["input_ids"], inputs["pixel_values"], 3 + 8 + 10
    assert ids[0, length - 3] == END and ids[0, length] == START, "the first two images, and the text between"
    wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    counts = {"num_visual_tokens": [4, 6, 4], "num_tiles": torch.tensor([1, 1, 1])}
    encoded = []
    model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    for more in ({}, counts):
        cache = DynamicCache(config=model.config.get_text_config())
        model(input_ids=ids[:, :length], pixel_values=pixels[:2], cache=cache)
        encoded.clear()
        asked = {**inputs, **more, CACHE: cache}
        if as_embeds:
            asked["inputs_embeds"] = model.get_input_embeddings()(asked.pop("input_ids"))
            asked.pop("num_visual_tokens", None)
        answer = model.generate(**asked, max_new_tokens=4, do_sample=False)
        assert torch.equal(answer[:, -4:], wanted[:, -4:]) and encoded == [1]
    cache.crop(length - 5 - cache.get_seq_length())
    with pytest.raises(
        ValueError, match="the cache ends after 16 tokens, within an image of tokens 12 to 17; crop it to 12"
    ):
        model.generate(**inputs, **{CACHE: cache}, max_new_tokens=4, do_sample=False)
    cache.crop(-16)
    assert torch.equal(model.generate(**inputs, **{CACHE: cache}, max_new_tokens=4, do_sample=False), wanted)


def test_a_static_cache_gives_the_same_text():
    """Servers and compiled decoding want a cache of fixed shape."""
    model, inputs = tiny(), prompts([[4], [6, 4]])
    wanted = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert model._can_compile_fullgraph
    static = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(static, wanted)


def test_the_step_over_a_static_cache_is_one_graph_and_gives_the_same_text():
    """What transformers compiles by itself on a GPU, here because it is told to; no further graph for a prompt of another length."""
    graphs = []

    def backend(graph, inputs, **options):
        graphs.append(graph)
        return graph.forward

    settings = CompileConfig(fullgraph=True, backend=backend)
    settings._compile_all_devices = True
    model = tiny()
    for counts in ([[4], [6, 4]], [[6], [4]]):
        inputs = prompts(counts)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        wanted = model.generate(**inputs, **options)
        static = {"cache_implementation": "static", "max_cache_len": 64, "compile_config": settings}
        assert torch.equal(model.generate(**inputs, **options, **static), wanted)
        assert len(graphs) == 1


def test_what_a_checkpoint_lacks_gets_its_parts_own_start():
    """Neither the memory's last content nor another class's rule: the projector as its constructor starts it, the encoder by its own."""
    config = tiny().config
    torch.manual_seed(0)
    model = TokenFlexForConditionalGeneration.from_pretrained(None, config=config, state_dict={})
    for layer in (model.projector.gate_up, model.projector.down):
        bound = layer.in_features**-0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound and 0.5 * bound < layer.bias.abs().max() <= bound
    assert (model.projector.norm.weight == 1).all() and (model.projector.norm.bias == 0).all()
    mlp = model.vision_tower.encoder.layers[0].mlp  # SigLIP's own: a bias that is not zero
    assert 0 < mlp.fc1.bias.abs().max() < 1e-4


def test_outputs_come_as_tuples_where_that_is_asked_for():
    model, inputs = tiny(), prompts([[4]])
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)
    labels = inputs["input_ids"]
    assert model(**inputs, labels=labels, return_dict=False)[0].dim() == 0


@pytest.mark.parametrize("model_class", [TokenFlexForConditionalGeneration, TokenFlexModel])
def test_outputs_hold_those_of_the_images(model_class):
    """As `get_image_features` gives them, one tensor per image; not while training, where they would be kept for nothing."""
    model = model_class(tiny().config).eval()
    model.set_attn_implementation("eager")
    inputs, asked = prompts([[4, 12], [18]]), {"output_hidden_states": True, "output_attentions": True}
    tiles = {"num_tiles": [1, 2, 3], "pixel_values": torch.rand(6, 3, 48, 64)}
    counts = [4, 6, 6]
    outputs = model(**{**inputs, **tiles}, **asked)
    wanted = model.get_image_features(**tiles, num_visual_tokens=counts, **asked)
    images = outputs.image_outputs
    assert [len(visual_ND) for visual_ND in images.pooler_output] == [4, 12, 18]
    torch.testing.assert_close(images.to_tuple(), wanted.to_tuple())
    assert len(images.hidden_states) == len(images.attentions) + 1 and images.attentions[0].shape[0] == 6
    as_tuple = model(**{**inputs, **tiles}, **asked, return_dict=False)[-1]
    torch.testing.assert_close(as_tuple, images.to_tuple())
    assert model(**{**inputs, **tiles}).image_outputs.hidden_states is None
    assert model(inputs["input_ids"][:, :2]).image_outputs is None
    assert model.train()(**{**inputs, **tiles}).image_outputs is None


def test_what_the_trainer_predicts_is_logits_alone(tmp_path):
    """Not the cache, nor the outputs of images, of which batches have different numbers."""
    rows = prompts([[4, 6], [6, 4], [4, 6]])
    data = [{name: rows[name][row] for name in ("input_ids", "attention_mask")} for row in range(3)]
    data = [{**row, "pixel_values": rows["pixel_values"][2 * at : 2 * at + 2]} for at, row in enumerate(data)]
    collate = lambda some: {
        name: (torch.cat if name == "pixel_values" else torch.stack)([row[name] for row in some]) for name in some[0]
    }
    settings = TrainingArguments(
        output_dir=tmp_path, per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    model = tiny()
    predicted = Trainer(model=model, args=settings, data_collator=collate).predict(data).predictions
    torch.testing.assert_close(torch.as_tensor(predicted), model(**rows).logits)


def test_labels_that_are_shifted_already():
    model, inputs = tiny(), prompts([[4]])
    labels = inputs["input_ids"]
    shifted = torch.cat([labels[:, 1:], torch.full((1, 1), -100)], dim=1)
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).loss, model(**inputs, labels=labels).loss)


def test_the_router_loss_comes_when_the_configuration_asks_for_it():
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    inputs = prompts([[4]])
    plain = tiny(**experts)(**inputs, labels=inputs["input_ids"])
    asked = tiny(**experts, output_router_logits=True)(**inputs, labels=inputs["input_ids"])
    assert plain.aux_loss is None and asked.aux_loss > 0
    torch.testing.assert_close(asked.loss, plain.loss + 0.5 * asked.aux_loss)


def test_the_base_model_has_the_same_weights_and_the_last_hidden_states():
    model, inputs = tiny(), prompts([[4, 6]])
    base = TokenFlexModel(model.config).eval()
    base.load_state_dict(model.state_dict())
    hidden = base(**inputs).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), model(**inputs).logits)
    assert torch.equal(model.base_model(**inputs).last_hidden_state, hidden)
    assert model.base_model.vision_tower is model.vision_tower
    assert not any(name.startswith("model.") for name in model.state_dict())
