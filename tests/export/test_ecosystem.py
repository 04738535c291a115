"""An export under the tools that people use: PEFT's adapters, transformers' pipeline, TRL's trainer."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TorchAoConfig, pipeline


def picture(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (48, 64, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def conversation(seed, answer="", question="What is it?"):
    turns = [
        {"role": "user", "content": [{"type": "image", "image": picture(seed)}, {"type": "text", "text": question}]}
    ]
    return turns + ([{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else [])


def lesson(folder):
    """Inputs of two conversations with labels, as a person would make them from the exported processor."""
    processor = AutoProcessor.from_pretrained(folder)
    batch = processor.apply_chat_template(
        [conversation(1, "a red box"), conversation(2, "blue")], tokenize=True, return_assistant_tokens_mask=True
    )
    learned = batch.pop("assistant_masks").bool()
    assert learned.any(1).all()
    return {**batch, "labels": batch["input_ids"].masked_fill(~learned, -100)}


def test_lora_trains_saves_loads_and_merges(tiny_export, tmp_path):
    """Only the adapters move; what is saved answers alike when it is loaded, and alike when it is merged into the export's weights."""
    peft = pytest.importorskip("peft")
    base = AutoModelForImageTextToText.from_pretrained(tiny_export)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    targets = ["q_proj", "v_proj", "projector.gate_up"]
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings).train()
    inputs, losses = lesson(tiny_export), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    model.eval()
    with torch.no_grad():
        wanted = model(**inputs).logits
        plain = AutoModelForImageTextToText.from_pretrained(tiny_export).eval()(**inputs).logits
        assert (wanted - plain).abs().max() > 1e-2
        model.save_pretrained(tmp_path / "adapter")
        again = AutoModelForImageTextToText.from_pretrained(tiny_export).eval()
        again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        torch.testing.assert_close(again(**inputs).logits, wanted, rtol=0, atol=0)
        assert torch.equal(again.generate(**inputs_alone(inputs), max_new_tokens=4), model.generate(**inputs_alone(inputs), max_new_tokens=4))  # fmt: skip
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(reloaded(**inputs).logits, merged(**inputs).logits, rtol=0, atol=0)
    assert reloaded.state_dict().keys() == before.keys()
    moved = {name for name, value in reloaded.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(any(f"{target}.weight" in name for target in targets) for name in moved), moved


def inputs_alone(inputs):
    return {name: value for name, value in inputs.items() if name != "labels"}


def test_the_pipeline_says_the_same_at_every_batch_size(tiny_export):
    """Prompts of several lengths: padding is on the left, and a row's text does not depend on its neighbours."""
    asked = [
        conversation(seed, question=text) for seed, text in ((1, "What?"), (2, "How many boxes are there?"), (3, "Why"))
    ]
    answer = pipeline(
        "image-text-to-text", model=str(tiny_export), processor=AutoProcessor.from_pretrained(tiny_export)
    )
    options = {"return_full_text": False}
    settings = {"do_sample": False, "max_new_tokens": 5}
    alone = [answer(text=one, generate_kwargs=dict(settings), **options)[0]["generated_text"] for one in asked]
    for batch_size in (1, 3):
        came = answer(text=asked, batch_size=batch_size, generate_kwargs=dict(settings), **options)
        assert [each[0]["generated_text"] for each in came] == alone
    assert len(set(alone)) > 1 or any(alone)


@pytest.mark.slow
def test_trls_trainer_takes_an_export(tiny_export, tmp_path):
    """Two steps of SFT on images and text."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": text_only(conversation(seed, "a red box")), "images": [picture(seed)]} for seed in range(8)]
    features = datasets.Features(
        {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
         "images": datasets.List(datasets.Image())}
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows, features=features)
    settings = trl.SFTConfig(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        bf16=False, logging_steps=1, save_strategy="no", max_length=None, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(tiny_export)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trl.SFTTrainer(
        model=model, args=settings, train_dataset=data, processing_class=AutoProcessor.from_pretrained(tiny_export)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses) and losses[1] < losses[0]
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("vision_tower.") for name in moved) and any(
        name.startswith("projector.") for name in moved
    )


def text_only(messages):
    """TRL's form: content as text, images beside."""
    return [
        {"role": turn["role"], "content": "".join(item.get("text", "") for item in turn["content"])}
        for turn in messages
    ]


def test_the_language_model_loads_in_8_bit(tiny_export):
    """Through transformers' own torchao settings: its matrices are int8, encoder and projector as they were, the text nearly so."""
    quantization = pytest.importorskip("torchao.quantization")
    kept = ["vision_tower", "projector", "router", "lm_head"]
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    plain = AutoModelForImageTextToText.from_pretrained(tiny_export).eval()
    model = AutoModelForImageTextToText.from_pretrained(tiny_export, quantization_config=settings).eval()
    in_8_bit = {name for name, value in model.named_parameters() if type(value.data) is quantization.Int8Tensor}
    linear = {name for name, module in plain.language_model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert in_8_bit == {f"language_model.{name}.weight" for name in linear if name != "lm_head"} and len(in_8_bit) == 14
    for name, value in plain.named_parameters():
        if name not in in_8_bit:
            assert torch.equal(model.get_parameter(name), value), name
    processor = AutoProcessor.from_pretrained(tiny_export)
    inputs = processor.apply_chat_template(conversation(1), tokenize=True, add_generation_prompt=True)
    with torch.no_grad():
        wanted, logits = plain(**inputs).logits, model(**inputs).logits
    assert 0 < (logits - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert model.generate(**inputs, max_new_tokens=4).shape[1] <= inputs["input_ids"].shape[1] + 4
