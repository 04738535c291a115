"""Evaluation: exact match by real generation, the same figures on any number of ranks, a table and a plot of them."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, run_ranks
from PIL import Image

from tokenflex.data import Limits, find_shards
from tokenflex.data.shards import as_shards
from tokenflex.evaluate import Answers, accuracy_table, evaluate_model, exact_match, plot_accuracy
from tokenflex.evaluate.questions import read_questions
from tokenflex.export import export_model
from tokenflex.model import build_model

RECORD = {
    "accuracy": {"coarse": {"4": 0.5, "6": 0.625, "12": 1.0}, "text": {"4": 0.0, "6": 0.0, "12": 0.0}},
    "num_questions": {"coarse": 8, "text": 4},
    "trained": [4, 12],
}


@pytest.mark.parametrize("answer, expected, is_right", [
    ("7", "7", True), (" Yes\n", "yes", True), ("7 2", "72", False), ("", "0", False), ("17", "7", False),
])  # fmt: skip
def test_exact_match(answer, expected, is_right):
    assert exact_match(answer, expected) == is_right


def test_table_has_every_figure_and_marks_trained_counts():
    lines = accuracy_table(RECORD).splitlines()
    assert lines[0] == "| task (questions) | **4** | 6 | **12** |"
    assert lines[2:] == ["| coarse (8) | 50.0 | 62.5 | 100.0 |", "| text (4) | 0.0 | 0.0 | 0.0 |"]


def test_plot_is_a_picture_with_lines_in_it(tmp_path):
    plot_accuracy(RECORD, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size == (960, 540) and len(image.convert("RGB").getcolors(100_000)) > 100


ROUTED = {
    **RECORD,
    "accuracy": {**RECORD["accuracy"], "dense": {"4": 0.25, "6": 0.5, "12": 0.75}},
    "num_questions": {**RECORD["num_questions"], "dense": 4},
    "auto": {
        "effort": 0.5,
        "right": {"coarse": 6, "text": 1, "dense": 3},
        "visual_tokens": {"coarse": 40, "text": 0, "dense": 48},
        "images": {"coarse": 10, "text": 0, "dense": 4},
    },
}


def test_the_table_has_the_routers_column_its_tokens_and_all_questions_with_images():
    lines = accuracy_table(ROUTED).splitlines()
    assert lines[0] == "| task (questions) | **4** | 6 | **12** | auto | tokens of auto |"
    assert lines[2:] == [
        "| coarse (8) | 50.0 | 62.5 | 100.0 | 75.0 | 4.0 |",
        "| text (4) | 0.0 | 0.0 | 0.0 | 25.0 |  |",
        "| dense (4) | 25.0 | 50.0 | 75.0 | 75.0 | 12.0 |",
        "| all with images (12) | 41.7 | 58.3 | 91.7 | 75.0 | 6.3 |",
    ]


def test_the_plot_has_a_star_where_the_router_comes_to(tmp_path):
    """A star of each task with images, and one of all, in pixels that the plot without a router does not have."""
    plot_accuracy(ROUTED, tmp_path / "routed.png")
    plot_accuracy({key: value for key, value in ROUTED.items() if key != "auto"}, tmp_path / "plain.png")
    black = []
    for name in ("routed", "plain"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (960, 540)
            pixels = image.convert("RGB").crop((100, 20, 700, 480)).getdata()
            black.append(sum(pixel == (0, 0, 0) for pixel in pixels))
    assert black[0] > black[1] + 200  # the line of all questions and its star


class Oracle:
    """Answers every question right at 12 visual tokens or more, and with nonsense below: its score is known."""

    device = torch.device("cpu")

    def __init__(self, processor, samples):
        self.processor = processor
        self.answers = {}
        for sample in samples:
            prompt = processor.apply_chat_template(sample.messages_with_images()[:-1], add_generation_prompt=True)
            self.answers.setdefault(prompt, []).append("".join(i["text"] for i in sample.messages[-1]["content"]))

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, pixel_values=None, num_tiles=None):
        rows = []
        for ids, mask in zip(input_ids, attention_mask):
            text = self.processor.tokenizer.decode(ids[mask.bool()])
            per_image = text.count("<IMG_CONTEXT>") // max(1, text.count("<img>"))
            prompt = re.sub("(<IMG_CONTEXT>)+", "<IMG_CONTEXT>", text)
            answer = self.answers[prompt].pop(0) if per_image >= 12 or "<img>" not in text else "wrong"
            rows.append(self.processor.tokenizer(answer + "<|im_end|>")["input_ids"])
        length = max(map(len, rows))
        pad = self.processor.tokenizer.pad_token_id
        return torch.cat([input_ids, torch.tensor([row + [pad] * (length - len(row)) for row in rows])], dim=1)


def test_a_model_of_known_score_gets_that_score(corpus, processor):
    samples = read_questions(as_shards(find_shards([str(corpus / "eval")])), 2, Limits()).samples
    settings = SimpleNamespace(num_visual_tokens=(4, 12), batch_size=3, max_new_tokens=8)
    answers = evaluate_model(Oracle(processor, samples), processor, samples, settings)
    accuracy, totals = answers.accuracy()
    with_images = {sample.task for sample in samples if sample.images}
    assert with_images and {sample.task for sample in samples} - with_images
    assert set(totals.values()) == {2}
    for task, row in accuracy.items():
        assert row == {"4": 0.0 if task in with_images else 1.0, "12": 1.0}
    for sample, *rights in zip(samples, answers.right[4], answers.right[12], strict=True):
        assert rights == [not sample.images, True]
    halves = [
        evaluate_model(Oracle(processor, part), processor, part, settings) for part in (samples[1::2], samples[::2])
    ]
    whole = Answers.join(halves)
    assert whole.accuracy() == (accuracy, totals) and whole.keys == sorted(answers.keys)
    assert whole.as_dict()["right"] == {"4": "".join(str(int(r)) for r in whole.right[4]), "12": "1" * len(samples)}


def test_two_ranks_measure_what_one_does(tmp_path, tiny_config, processor, cache_dir, corpus):
    torch.manual_seed(0)
    model = build_model(tiny_config.model, tiny_config.budget, processor, torch.float32)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    export_model(model, state, processor, tmp_path / "model")
    records = []
    for num_ranks in (1, 2):
        folder = tmp_path / str(num_ranks)
        arguments = ["launch/evaluate.py", "--config", TINY, "--model", tmp_path / "model", f"output_dir={folder}"]
        ends = run_ranks(num_ranks, [*arguments, f"data.cache_dir={cache_dir}"])
        assert all(end.status == 0 for end in ends), ends
        assert "AutoModelForImageTextToText.from_pretrained" in ends[0].output and "| coarse" in ends[0].output
        records.append(json.loads((folder / "tiny" / "accuracy.json").read_text()))
        assert (folder / "tiny" / "accuracy.png").exists()
        records[-1]["answers"] = json.loads((folder / "tiny" / "answers.json").read_text())
    assert records[0] == records[1]
    assert len(records[0]["answers"]["keys"]) == sum(records[0]["num_questions"].values())
    assert list(records[0]["accuracy"]["coarse"]) == ["4", "6", "12"]
