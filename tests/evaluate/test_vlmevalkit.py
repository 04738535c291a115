"""VLMEvalKit itself over an export: its run.py, its dataset classes and its scoring, on tables that are made here.

`make test-evaluators VLMEVALKIT=DIR` has it, DIR being a clone; its interface restated is in `test_harness.py`.
"""

import base64
import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from tokenflex.infer import Generator

COUNTS = {"4": 4, "2x3": (2, 3), "auto": 4}
"""As asked for on the command line: what `Generator` is asked for (this export's router takes its smallest count)."""
CLASSES = {
    "Tiny_MMBench": "ImageMCQDataset",
    "Tiny_MMMU": "MMMUDataset",
    "Tiny_OCRVQA": "ImageVQADataset",
    "Tiny_POPE": "ImageYORNDataset",
}
"""Tables by name, which chooses the scoring, and the class that reads them."""
CHOICE = "Please select the correct answer from the options above. \n"


@pytest.fixture(scope="module")
def program():
    """Path of its run.py, which lies beside the package in a clone."""
    found = importlib.util.find_spec("vlmeval")
    if found is None:
        pytest.skip("VLMEvalKit is not installed; make test-evaluators VLMEVALKIT=DIR, a clone of its repository")
    return Path(found.origin).parents[1] / "run.py"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(("red", "blue")):
        image = Image.new("RGB", (64, 48), colour)
        image.paste("white", (8 + 16 * number, 8, 24 + 16 * number, 40))
        image.save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(2)]


@pytest.fixture(scope="module")
def generator(telling_export):
    return Generator(telling_export)


def messages(pictures):
    """What the model is to be asked, by table and row: texts and paths in their order."""
    first, second = pictures
    bench = "Question: Which colour is it?\nOptions:\nA. {}\nB. {}\n" + CHOICE
    return {
        # the same question with its options turned is another row, a million on
        "Tiny_MMBench": {
            0: [first, "Hint: Look.\n" + bench.format("red", "blue")],
            1: [second, bench.format("red", "blue")],
            1000000: [first, "Hint: Look.\n" + bench.format("blue", "red")],
            1000001: [second, bench.format("blue", "red")],
        },
        "Tiny_MMMU": {
            0: [
                "Question: Is ",
                second,
                " bluer than ",
                first,
                "?\nOptions:\nA. more\nB. less\n" + CHOICE,
            ]
        },
        "Tiny_OCRVQA": {
            number: [picture, "What is written?\nAnswer the question using a single word or phrase."]
            for number, picture in enumerate(pictures)
        },
        "Tiny_POPE": {
            number: [picture, f"Is there a {thing} in the image? Please answer yes or no."]
            for number, (picture, thing) in enumerate(zip(pictures, ("dog", "cat")))
        },
    }


def write_tables(folder, pictures, written):
    """The tables as VLMEvalKit's are: a row per question, images in base64; `written` is OCRVQA's first answer."""
    first, second = (base64.b64encode(picture.read_bytes()).decode() for picture in pictures)
    colours = {"question": "Which colour is it?", "category": "colour", "split": "dev"}
    tables = {
        "Tiny_MMBench": [
            {"index": 0, "image": first, "hint": "Look.", "A": "red", "B": "blue", "answer": "A", **colours},
            {"index": 1, "image": second, "hint": "", "A": "red", "B": "blue", "answer": "B", **colours},
            # an index in place of an image is that row's image
            {"index": 1000000, "image": "0", "hint": "Look.", "A": "blue", "B": "red", "answer": "B", **colours},
            {"index": 1000001, "image": "1", "hint": "", "A": "blue", "B": "red", "answer": "A", **colours},
        ],
        "Tiny_MMMU": [
            {
                "index": 0,
                "image": repr([first, second]),
                "question": "Is <image 2> bluer than <image 1>?",
                "A": "more",
                "B": "less",
                "answer": "A",
                "category": "colour",
                "split": "validation",
            }
        ],
        "Tiny_OCRVQA": [
            {"index": number, "image": image, "question": "What is written?", "answer": answer}
            for number, (image, answer) in enumerate(((first, written), (second, "something else")))
        ],
        "Tiny_POPE": [
            {
                "index": number,
                "image": image,
                "question": f"Is there a {thing} in the image? Please answer yes or no.",
                "answer": "No",
                "category": "popular",
            }
            for number, (image, thing) in enumerate(((first, "dog"), (second, "cat")))
        ],
    }
    folder.mkdir()
    for name, rows in tables.items():
        with (folder / f"{name}.tsv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)


def answer(generator, parts, count):
    """The model's answer to texts and images in turn, without the class under test."""
    content = [
        {"type": "image", "image": part} if isinstance(part, Path) else {"type": "text", "text": part} for part in parts
    ]
    inputs = generator.inputs([{"role": "user", "content": content}], count)
    output = generator.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return generator.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.timeout(900)
def test_its_own_program_asks_and_scores(program, telling_export, generator, pictures, tmp_path):
    wanted = {
        name: {
            table: {index: answer(generator, parts, count) for index, parts in rows.items()}
            for table, rows in messages(pictures).items()
        }
        for name, count in COUNTS.items()
    }
    assert wanted["2x3"] != wanted["4"] and all(len(set(told.values())) == len(told) for told in wanted["4"].values())
    written = wanted["4"]["Tiny_OCRVQA"][0]
    write_tables(tmp_path / "data", pictures, written)
    classes = {name: {"class": kind, "dataset": name} for name, kind in CLASSES.items()}
    command = [sys.executable, "-m", "tokenflex.evaluate.harness.vlmevalkit", program, "--pretrained", telling_export]
    command += ["--num-visual-tokens", ",".join(COUNTS), "--max-new-tokens", "8", "--"]
    command += ["--data", *CLASSES, "--data-config", json.dumps(classes), "--work-dir", tmp_path / "out"]
    command += ["--judge", "exact_matching"]
    here = {"LMUData": str(tmp_path / "data"), "PRED_FORMAT": "tsv", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        list(map(str, command)), env={**os.environ, **here}, cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    for name, tables in wanted.items():
        folder = tmp_path / "out" / f"tokenflex-{name}"
        metrics = {
            table: told.get("metrics")
            for table, told in json.loads((folder / "status.json").read_text())["datasets"].items()
        }
        assert list(metrics) == list(CLASSES) and all(metrics.values()), ended.stderr[-4000:]
        for table, answers in tables.items():
            with (folder / f"tokenflex-{name}_{table}.tsv").open(newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t"))
            assert {int(row["index"]): row["prediction"] for row in rows} == answers
        assert metrics["Tiny_OCRVQA"] == {"Overall": 50.0 if tables["Tiny_OCRVQA"][0] == written else 0.0}
