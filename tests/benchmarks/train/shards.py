"""Shards of samples with set lengths: an image of noise, a question, an answer. Every arm of the benchmark reads the same."""

import io
import json

import numpy as np
import webdataset
from PIL import Image

LENGTHS = ("uniform", "heavy-tailed")
WORDS = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()
QUESTION = 4
"""Words of a question."""


def answer_lengths(kind, number, longest, rng):
    """Words of each answer: uniform up to `longest`, or a log-normal whose mean is a twelfth of it, cut off there."""
    if kind == "uniform":
        return rng.integers(1, longest + 1, number)
    return rng.lognormal(np.log(longest / 28), 1.3, number).astype(int).clip(1, longest)


def write_shards(folder, kind, number, longest, seed=0, has_images=True):
    """One tar of `number` samples of a kind of lengths, with an image each or without, as docs/data.md says."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with open(folder / "shard-00000.tar", "wb") as file, webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
        for index, length in enumerate(answer_lengths(kind, number, longest, rng)):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=92)
            question = [{"type": "image"}] * has_images + [
                {"type": "text", "text": " ".join(rng.choice(WORDS, QUESTION))}
            ]
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": " ".join(rng.choice(WORDS, length))},
            ]
            writer.write({"__key__": f"{index:06d}", "json": json.dumps({"messages": messages}).encode()})
            if has_images:
                writer.write({"__key__": f"{index:06d}", "0.jpg": buffer.getvalue()})


def read_shards(folder):
    """[(messages, images)] of all samples of a folder of shards, as a person's own script would read them."""
    samples = []
    for path in sorted(folder.glob("*.tar")):
        entries = {}
        for entry in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
            of = entries.setdefault(entry["__key__"], {})
            of.update({name: value for name, value in entry.items() if not name.startswith("__")})
        for of in entries.values():
            names = sorted((name for name in of if name.endswith("jpg")), key=lambda name: int(name.split(".")[0]))
            samples.append((json.loads(of["json"])["messages"], [of[name] for name in names]))
    return samples
