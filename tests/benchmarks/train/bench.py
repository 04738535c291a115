#!/usr/bin/env python3
"""Useful tokens per second of whole training steps, ours beside other trainers: one model, the same shards, arms by turns.

`make bench-train` writes docs/results/train-speed.json and the table of docs/speed.md; ARGS="--turns 5 --seconds 6" takes longer and is
steadier. TRL's arm needs the extra `ecosystem`, and is left out, by name, where it is not installed.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(Path(__file__).parent))

from shards import LENGTHS, read_shards, write_shards  # noqa: E402
from table import table, written  # noqa: E402

from tokenflex.config import load_config  # noqa: E402
from tokenflex.corpus import encoder, resolve_embedded  # noqa: E402
from tokenflex.corpus.tokenizer import build_tokenizer  # noqa: E402
from tokenflex.export import export_model  # noqa: E402
from tokenflex.model import build_model, build_processor  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "speed.md", ROOT / "docs" / "results" / "train-speed.json"
ENCODER = json.dumps({"model_type": "bit", **encoder.ARCHITECTURE})
MODELS = {
    "0.9M": (ROOT / "configs" / "quickstart.yaml", [f"model.vision={ENCODER}"]),
    "98M": (ROOT / "tests" / "estimate" / "hundred-million.yaml", []),
}
"""The quick start's model and one of a hundred million parameters, both from scratch."""
PACKS = {
    "0.9M": {"pack_length": 768, "packs_per_step": 4, "longest": 330},
    "98M": {"pack_length": 512, "packs_per_step": 2, "longest": 220},
}
"""Of the made-up lengths: the longest sample fills most of a pack."""
NUM_SAMPLES = 1500
FUSED = "off" if torch.cuda.is_available() else "on"
OURS = {
    "ours": [],
    "ours, ZeRO-3": [],
    "ours, a sample per pack": None,
    "ours, counts mixed in a step": ["data.mixing=free"],
    f"ours, fused loss {FUSED}": [f"train.fused_loss={FUSED}"],
}
"""Arms of our own -> their overrides; a sample per pack has those of its workload."""
PADDED, PACKED_TEXT = "Hugging Face Trainer, padded", "TRL SFT, packed"


def settings_of(model, workload, folder):
    """(recipe, overrides) of a model on a workload; made-up shards are written once."""
    recipe, overrides = MODELS[model]
    common = [*overrides, "data.num_workers=1", "train.num_steps=1000000", "train.save_every=0", "train.wandb=off", "model.probe=false", "train.hang_timeout_s=100000",
              "evaluate.at_end=false", "data.packs_per_micro_batch=8"]  # fmt: skip
    if workload == "quick start":
        return recipe, [*common, "data.evaluation=[]"]
    kind, has_images = workload.removesuffix(", text alone"), not workload.endswith("text alone")
    packs, shards = PACKS[model], folder / model / workload
    if not shards.exists():
        write_shards(shards, kind, NUM_SAMPLES, packs["longest"], has_images=has_images)
    data = [f"data.{key}={packs[key]}" for key in ("pack_length", "packs_per_step")]
    lists = [
        f"data.train=[{json.dumps(str(shards))}]",
        "data.evaluation=[]",
        "data.lockstep_packs=1",
        "data.shuffle_window=0",
    ]
    return recipe, [*common, *data, *lists, "data.max_images_per_pack=64", f"model.tokenizer={folder / 'tokenizer'}"]


def prepare(model, workload, folder):
    """(What every arm of a workload is told, our arms' overrides, the share of the padded arm's tokens that is useful)."""
    recipe, overrides = settings_of(model, workload, folder)
    config = resolve_embedded(load_config(recipe, overrides), lambda text: None)
    processor = build_processor(config.model, config.budget)
    exported = folder / model / "model"
    if not exported.exists():
        torch.manual_seed(0)
        built = build_model(config.model, config.budget, processor, torch.float32)
        export_model(built, dict(built.state_dict()), processor, exported)
    samples = [sample for path in config.data.train for sample in read_shards(Path(path))]
    counts = dict(zip(config.budget.num_visual_tokens, config.budget.probabilities))
    mean = sum(lengths_of(samples[:300], processor, round(sum(n * p for n, p in counts.items())))) / len(samples[:300])
    batch_size = max(1, round(config.data.packs_per_step * config.data.pack_length / mean))
    (shards,) = config.data.train
    useful = useful_share(samples, processor, batch_size, counts)
    common = {"recipe": str(recipe), "model": str(exported), "shards": shards, "batch_size": batch_size, "num_workers": 1,
              "counts": list(counts), "probabilities": list(counts.values()), "threads": len(os.sched_getaffinity(0)),
              "pack_length": config.data.pack_length}  # fmt: skip
    return common, overrides, useful


def lengths_of(samples, processor, count):
    """Tokens of samples at a count of visual tokens."""
    for messages, images in samples:
        text = processor.apply_chat_template(messages, tokenize=False)
        yield len(processor.tokenizer(text)["input_ids"]) + len(images) * count


def useful_share(samples, processor, batch_size, counts, num_batches=400):
    """Of the tokens in batches as the padded arm draws them, how many are no padding."""
    draw, useful, all_tokens = random.Random(0), 0, 0
    texts = list(lengths_of(samples[:NUM_SAMPLES], processor, 0))
    sizes = [(text, len(images)) for text, (_, images) in zip(texts, samples)]
    for _ in range(num_batches):
        (count,) = draw.choices(list(counts), list(counts.values()))
        lengths = [text + images * count for text, images in draw.sample(sizes, batch_size)]
        useful, all_tokens = useful + sum(lengths), all_tokens + batch_size * max(lengths)
    return round(useful / all_tokens, 3)


def arms_of(model, workload, common, overrides):
    """{arm: its specification}; TRL's has text alone, where it packs."""
    specs = {}
    if workload.endswith("text alone"):
        if importlib.util.find_spec("trl"):
            packs = PACKS[model]["packs_per_step"]
            specs[PACKED_TEXT] = {**common, "arm": "packed text", "batch_size": packs}
        names = ["ours"]
    else:
        specs[PADDED] = {**common, "arm": "padded"}
        names = list(OURS) if model == "0.9M" else ["ours", "ours, a sample per pack"]
    for name in names:
        if OURS[name] is None and workload == "quick start":
            continue  # some of its samples have two images, and others none
        alone = [
            f"data.packs_per_step={common['batch_size']}",
            "data.max_images_per_pack=1",
            "data.packs_per_micro_batch=1",
        ]
        more = alone if OURS[name] is None else OURS[name]
        stage = 3 if name.endswith("ZeRO-3") else 0
        specs[name] = {
            **common,
            "arm": "ours",
            "overrides": [*overrides, *more],
            "ds_config": str(ROOT / f"configs/zero{stage}.json"),
        }
    return specs


class Arm:
    """A process that trains when it is asked."""

    def __init__(self, spec, folder, number):
        place = folder / f"arm-{number}"
        place.mkdir(parents=True)
        spec = {**spec, "folder": str(place)}
        if "overrides" in spec:
            spec["overrides"] = [*spec["overrides"], f"output_dir={place}"]
        (place / "spec.json").write_text(json.dumps(spec))
        self.log = place / "log"
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        variables = {"PYTHONPATH": os.pathsep.join(paths), "MASTER_PORT": str(29600 + number), "HF_HUB_OFFLINE": "1",
                     "OMP_NUM_THREADS": str(spec["threads"]), "PYTHONWARNINGS": "ignore"}  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("arms.py")), str(place / "spec.json")], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **variables}, cwd=ROOT,
            )  # fmt: skip

    def answer(self):
        """What it says next: {tokens, s, cpu_s}.

        Raises:
            RuntimeError: it has ended.
        """
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.log}:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def steps(self, number):
        """So many steps."""
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        """End it; where it hangs, kill it."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure(specs, folder, turns, seconds):
    """{arm: [useful tokens per second of each turn]}; one arm works at a time, in another order every turn."""
    arms, found = {}, {name: {"tokens_per_s": [], "tokens_per_cpu_s": []} for name in specs}
    with contextlib.ExitStack() as stack:
        for number, (name, spec) in enumerate(specs.items()):
            arms[name] = Arm(spec, folder, number)
            stack.callback(arms[name].close)
        for arm in arms.values():
            arm.answer()
        numbers = {name: max(2, round(seconds / (arm.steps(2)["s"] / 2))) for name, arm in arms.items()}
        for turn in range(turns):
            for name in sorted(arms, key=lambda name: (list(arms).index(name) + turn) % len(arms)):
                answer = arms[name].steps(numbers[name])
                found[name]["tokens_per_s"].append(round(answer["tokens"] / answer["s"], 1))
                found[name]["tokens_per_cpu_s"].append(round(answer["tokens"] / answer["cpu_s"], 1))
    return found


def workloads(models):
    """(model, workload) in the order of the table."""
    for model in models:
        yield from ((model, name) for name in (["quick start"] if model == "0.9M" else []))
        yield from ((model, name) for name in LENGTHS)
        if model == "0.9M":
            yield model, f"{LENGTHS[1]}, text alone"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of an arm's turn, about")
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the record; the page is written with the default alone"
    )
    options = parser.parse_args()
    record = described(options.turns)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_tokenizer().save_pretrained(folder / "tokenizer")
        for model, workload in workloads(options.models.split(",")):
            common, overrides, useful = prepare(model, workload, folder)
            specs = arms_of(model, workload, common, overrides)
            found = measure(specs, folder / "arms" / f"{model} {workload}", options.turns, options.seconds)
            record["rows"].append({"model": model, "workload": workload, "useful_share_padded": useful, "arms": found})
            print(json.dumps(record["rows"][-1]), flush=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")  # what is killed later keeps these
    if options.out == RESULTS:
        PAGE.write_text(written(PAGE.read_text(), record))
    print(table(record))


def described(turns):
    """A record without rows."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "what": __doc__.splitlines()[0], "turns": turns,
        "date": subprocess.run(["date", "-I"], capture_output=True, text=True, check=True).stdout.strip(),
        "machine": {"device": device, "threads": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "deepspeed")},
        "left_out": [] if importlib.util.find_spec("trl") else [f"{PACKED_TEXT} (not installed)"], "rows": [],
    }  # fmt: skip


if __name__ == "__main__":
    main()
