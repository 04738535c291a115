"""The commands of docs/training.md that lead from two folders of weights to a model, and small parts to run them on."""

import re
import shlex

import torch
from conftest import ROOT
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, SiglipConfig, SiglipModel

STAGES = ("pretrain", "enhance", "finetune")
SMALL = [
    "model.image_size=[48,48]", "model.add_image_tokens=true", "model.probe=false", "model.gradient_checkpointing=false",
    "budget.num_visual_tokens=[4,9,16]", "data.pack_length=640", "data.max_images_per_pack=12", "data.packs_per_step=4",
    "data.lockstep_packs=4", "data.num_workers=0", "optimizer.warmup_steps=1", "train.num_steps=2", "train.wandb=off",
    "evaluate.num_visual_tokens=[4,6]", "evaluate.max_samples_per_task=1", "evaluate.max_new_tokens=2",
]  # fmt: skip
"""What makes a stage small, and nothing else about it."""


def commands_of_the_page(program):
    """[arguments] of the lines of the page's section that begin with a program."""
    page = (ROOT / "docs" / "training.md").read_text()
    (section,) = re.findall(r"(?ms)^## From two folders of weights to a model$(.*?)^## ", page)
    lines = [line for block in re.findall(r"(?ms)^```$(.*?)^```$", section) for line in block.strip().splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(program + " ")]


def save_parts(folder, corpus):
    """A SigLIP (both towers, as it is published) and a Qwen with its tokenizer, saved by transformers."""
    torch.manual_seed(7)
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    vision = {**tower, "image_size": 48, "patch_size": 8}
    SiglipModel(SiglipConfig(vision_config=vision, text_config={**tower, "vocab_size": 50})).save_pretrained(
        folder / "siglip"
    )
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    Qwen2ForCausalLM(Qwen2Config(**tower, num_key_value_heads=1, vocab_size=len(tokenizer))).save_pretrained(
        folder / "qwen"
    )
    tokenizer.save_pretrained(folder / "qwen")


def localised(arguments, folder, corpus):
    """A command's arguments with its folders' names replaced by those that are here."""
    places = {"weights/": f"{folder}/", "/data/eval": f"{corpus}/eval"}
    places.update({f"/data/{name}": f"{corpus}/train" for name in ("pretrain", "enhance", "instruct")})

    def here(argument):
        if argument.startswith("configs/"):
            return str(ROOT / argument)
        key, equals, value = argument.partition("=")
        for there, place in places.items():
            if value.startswith(there):
                return f"{key}={place}{value.removeprefix(there)}"
        return argument

    return [here(argument) for argument in arguments]


def small(stage, runs, cache_dir):
    """The overrides of a stage: small, and below `runs`."""
    before = dict(zip(STAGES[1:], STAGES)).get(stage)
    return [
        *SMALL,
        f"output_dir={runs}",
        f"data.cache_dir={cache_dir}",
        *([f"model.init_from={runs}/{before}/model"] if before else []),
    ]


def check(folder, runs):
    """Each stage has moved what it trains and nothing else, and the last model is whole."""

    def weights(path, prefix=""):
        with safe_open(path / "model.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118

    came = weights(folder / "siglip", "vision_model.encoder")
    after = [weights(runs / stage / "model") for stage in STAGES]
    for name, tensor in came.items():
        assert any(
            torch.equal(tensor, other)
            for key, other in after[0].items()
            if key.endswith(name.removeprefix("vision_model."))
        ), name
    moved = [
        {name.partition(".")[0] for name in new if not torch.equal(new[name], old[name])}
        for old, new in zip(after, after[1:])
    ]
    assert moved == [{"vision_tower", "projector"}, {"vision_tower", "projector", "language_model"}]
    assert (runs / "pretrain" / "weights.json").read_text().count("blake3") == 2
    assert (runs / "finetune" / "accuracy.json").exists()
