#!/usr/bin/env python3
"""What `tokenflex estimate` says of the shipped recipes, as the table of docs/training.md: `python tests/estimate/recipes.py` writes it.

No hub is asked: each part is its maker's configuration, written down here.
"""

from pathlib import Path

from tokenflex.config import load_config
from tokenflex.estimate import estimate, gpu_named, workload_of
from tokenflex.parallel import load_ds_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- begin: python tests/estimate/recipes.py -->", "<!-- end: python tests/estimate/recipes.py -->"
SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
INTERNVIT_300M = {
    "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
}  # fmt: skip
QWEN2_5_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN2_5_3B = {
    "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
PARAMETERS = {
    "SO400M": 412_442_352,
    "INTERNVIT_300M": 304_012_288,
    "QWEN2_5_7B": 7_615_616_512,
    "QWEN2_5_3B": 3_085_938_688,
    "QWEN3_8B": 8_190_735_360,
}
"""What the makers' checkpoints hold (SigLIP without its pooling head)."""
RECIPES = {
    "pretrain": (SO400M, QWEN2_5_7B, 64, "zero3"),
    "enhance": (SO400M, QWEN2_5_7B, 64, "zero3"),
    "finetune": (SO400M, QWEN2_5_7B, 64, "zero3"),
    "internvit-pretrain": (INTERNVIT_300M, QWEN2_5_7B, 64, "zero3"),
    "internvit-enhance": (INTERNVIT_300M, QWEN2_5_7B, 64, "zero3"),
    "internvit-finetune": (INTERNVIT_300M, QWEN2_5_7B, 64, "zero3"),
    "siglip2-qwen3": (SO400M, QWEN3_8B, 64, "zero3"),
    "lora": (SO400M, QWEN2_5_3B, 1, "zero0"),
}
"""Recipe -> its parts, GPUs and DeepSpeed file."""


def found(name):
    """The `Estimate` of a recipe on 80 GB GPUs, for full packs of equal samples."""
    vision, text, num_gpus, ds_config = RECIPES[name]
    config = load_config(ROOT / "configs" / f"{name}.yaml", ['model.init_from=""', "train.export_adapter=false"])
    model = config.model.model_copy(update={"vision": vision, "text": text})
    config = config.model_copy(update={"model": model})
    ds = load_ds_config(ROOT / "configs" / f"{ds_config}.json")
    return estimate(config, ds, workload_of(config), num_gpus=num_gpus, gpu=gpu_named("h100"))


def row(name):
    """A line of the table."""
    it = found(name)
    memory = it.memory[it.stage]
    trained = sum(part.trained for part in it.parts.values())
    total = sum(part.parameters for part in it.parts.values())
    return (
        f"| `configs/{name}.yaml` | {it.num_gpus} | `{RECIPES[name][3]}.json` | {total / 1e6:,.0f} | {trained / 1e6:,.1f} | {memory.total / 1e9:.1f} | "
        f"{it.step_s:.2f} | {it.run_s / 3600:.1f} | {it.checkpoint_bytes / 1e9:.1f} |"
    )


def table(rows):
    """The rows under their heads."""
    head = "| recipe | GPUs | DeepSpeed file | M parameters | M trained | GB per GPU, at most | s a step | hours | GB a checkpoint |"
    return "\n".join([head, "|---|---:|---|---:|---:|---:|---:|---:|---:|", *rows])


def main():
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table([row(name) for name in RECIPES])}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
