"""The law of records: what changes the conversation is said and shown, or the record is skipped by name; the rest is counted."""

import io
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_convert import PLAIN, converted, images, llava, picture, run_cli, samples_of, text_of  # noqa: F401

from tokenflex.data.problems import BadSample, Limits
from tokenflex.errors import UserError
from tokenflex.prepare.convert import Options, convert
from tokenflex.prepare.convert.fields import BOOKKEEPING, CHANGES_THE_TEXT, DROPPED, IMAGE_KEYS, KEPT
from tokenflex.prepare.convert.images import checked_image
from tokenflex.prepare.convert.records import convert_record


def said(record, **options):
    """[(role, text)] of a record; `[image]` where an image is."""
    made = convert_record(record, "Describe.", **options)
    return [(m["role"][0], text_of(m)) for m in made.messages]


ASK = {"from": "human", "value": "What?"}
TOLD = {"from": "gpt", "value": "a box"}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
READ = {
    "a system text beside the conversation": ({"system": "Be brief.", **llava(None, "What?")}, ["Be brief.", "What?", "a box"]),
    "a tag as a word": ({"question": "What is <image> in a page?", "answer": "a tag"}, ["What is <image> in a page?", "a tag"]),
    "tags as another model spells them": (
        {"images": ["a.jpg", "b.jpg"], "question": "<|vision_start|><|image_pad|><|vision_end|>or [IMG]?", "answer": "a box"},
        ["[image]or [image]?", "a box"],
    ),
    "a choice with a field for each option": (
        {"question": "Which?", "A": "red", "B": "blue", "C": None, "answer": "B"}, ["Which?\nA. red\nB. blue", "B"],
    ),
    "a choice with numbered options": (
        {"question": "Which?", "option_1": "red", "option_2": "blue", "answer": "blue"}, ["Which?\nA. red\nB. blue", "blue"],
    ),
    "a choice as an object": ({"question": "Which?", "options": {"A": "red", "B": "blue"}, "answer": "A"}, ["Which?\nA. red\nB. blue", "A"]),
    "an answer that is there twice": ({"question": "What?", "answer": "a box", "response": "a box"}, ["What?", "a box"]),
    "a system text of another name": ({"system_message": "Be brief.", "question": "What?", "answer": "a box"}, ["Be brief.", "What?", "a box"]),
    "Markdown as a word": ({"question": "What does ![a](b.png) do?", "answer": "x"}, ["What does ![a](b.png) do?", "x"]),
    "the same system text twice": (
        {"system": "Be brief.", "conversations": [{"from": "system", "value": "Be brief."}, ASK, TOLD]}, ["Be brief.", "What?", "a box"],
    ),
    "an image under another key": ({"img_path": "a.jpg", "conversations": [ASK, TOLD]}, ["[image]What?", "a box"]),
    "a file name": ({"file_name": "a.png", "caption": "a box"}, ["[image]Describe.", "a box"]),
    "numbered images": ({"image_2": "b.jpg", "image_1": "a.jpg", "conversations": [ASK, TOLD]}, ["[image][image]What?", "a box"]),
    "an empty list beside the image": ({"images": [], "image": "a.jpg", "conversations": [ASK, TOLD]}, ["[image]What?", "a box"]),
    "bytes and their name": ({"image": b"..", "image_name": "a.jpg", "question": "What?", "answer": "a box"}, ["[image]What?", "a box"]),
    "images of a turn": (
        {"messages": [{"role": "user", "content": "What?", "images": ["a.jpg"]}, {"role": "assistant", "content": "a box"}]},
        ["[image]What?", "a box"],
    ),
    "numbered tags": (
        {"images": ["a.jpg", "b.jpg"], "question": "<image_1> or <image_2>?", "answer": "a box"}, ["[image] or [image]?", "a box"],
    ),
    "an inline image": ({"conversations": [{"from": "user", "value": "Picture 1: <img>a.jpg</img>\nWhat?"}, TOLD]}, ["Picture 1: [image]\nWhat?", "a box"]),
    "instruction and input": ({"instruction": "Add.", "input": "1 2", "output": "3"}, ["Add.\n1 2", "3"]),
    "instruction, history and images": (
        {"instruction": "And now?", "input": "", "output": "3", "history": [["One?", "1"]], "images": ["a.jpg"]},
        ["[image]One?", "1", "And now?", "3"],
    ),
    "a number as answer": ({"question": "How many?", "answer": 0}, ["How many?", "0"]),
    "a number as a turn": ({"conversations": [ASK, {"from": "gpt", "value": 2.5}]}, ["What?", "2.5"]),
    "a choice": ({"question": "Which?", "options": ["red", "blue"], "answer": "B"}, ["Which?\nA. red\nB. blue", "B"]),
    "a choice that the question has": ({"question": "red or blue?", "choices": ["red", "blue"], "answer": "red"}, ["red or blue?", "red"]),
    "a question that is there twice": ({"question": "What?", "conversations": [ASK, TOLD]}, ["What?", "a box"]),
    "speakers in capitals": ({"conversations": [{"from": "Human", "value": "What?"}, {"from": "GPT", "value": "x"}]}, ["What?", "x"]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_people_have_is_read(name):
    record, texts = READ[name]
    made = convert_record(record, "Describe.")
    assert [text_of(message) for message in made.messages] == texts and not made.unread
    assert len(made.references) == sum(text.count("[image]") for text in texts)
    if name == "numbered images":
        assert made.references == ["a.jpg", "b.jpg"]


COUNTED = {
    "the name of the image again": (
        {
            "image": "x/a.jpg",
            "original_name": "a.jpg",
            "origin_url": "http://far.away/b.jpg",
            "question": "What?",
            "answer": "a box",
        },
        ["[image]What?", "a box"],
    ),
    "the conversation once more": (
        {"question": "What?", "answer": "a box", "prompt_text": "Q: What?\nA: a box"},
        ["What?", "a box"],
    ),
    "remarks about what is said": (
        {"prompt_tokens": "9", "system_version": "b", "question": "What?", "answer": "a box"},
        ["What?", "a box"],
    ),
    "a caption beside the image": (
        {"image": "a.jpg", "caption": "x", "question": "What?", "answer": "a box"},
        ["[image]What?", "a box"],
    ),
    "an answer that is right": ({"question": "What?", "answer": "a box", "is_correct": True}, ["What?", "a box"]),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_says_nothing_more_is_counted(name):
    record, texts = COUNTED[name]
    made = convert_record(record, "Describe.")
    assert [text_of(message) for message in made.messages] == texts and made.unread


SKIPPED = {
    "a lost image": (llava(None), "image-missing", "none came"),
    "a lost image at the end": (llava(None, "What?\n<image>"), "image-missing", "none came"),
    "images and videos apart": ({"image": "b.jpg", "frames": ["a.jpg"], "question": "What?", "answer": "x"}, "field", "order is not clear"),
    "an image that would not be shown": ({"image": "a.jpg", "target": "b.png", "conversations": [ASK, TOLD]}, "field", "'target' holds an image"),
    "bytes of an image under an unknown name": ({"left": {"bytes": b"..", "path": None}, "conversations": [ASK, TOLD]}, "field", "'left' holds an image"),
    "a crop": ({"image": "a.jpg", "crop": [0, 0, 9, 9], "conversations": [ASK, TOLD]}, "field", "'crop'"),
    "turns under an unknown name": ({"image": "a.jpg", "caption": "x", "qas": [{"question": "a", "answer": "b"}]}, "field", "'qas' holds turns"),
    "an answer that is marked as wrong": ({"question": "x", "answer": "y", "is_correct": False}, "no-answer", "'is_correct'"),
    "two answers": ({"question": "x", "answer": "y", "response": "z"}, "field", "different texts"),
    "several questions": ({"question": ["a", "b"], "answer": ["c", "d"]}, "message", "2 questions"),
    "a turn of several texts": ({"conversations": [ASK, {"from": "gpt", "value": ["a", "b"]}]}, "message", "2 texts"),
    "a transcript as a caption": ({"image": "a.jpg", "text": "### Human: x\n### Assistant: y"}, "message", "whole conversation"),
    "a masked turn": ({"conversations": [ASK, {**TOLD, "mask": True}]}, "no-answer", "no assistant"),
    "a chain of thought": ({"question": "x", "answer": "y", "cot": "hm"}, "field", "'cot'"),
    "a lost video": ({"video": [], **llava(None, "<video>\nWhat?")}, "clip", "none came"),
    "two videos and a tag": ({"videos": ["a.mp4", "b.mp4"], **llava(None, "<video>\nWhat?")}, "image-tags", "1 <image> tags but 2"),
    "two fields of videos": ({"video": "a.mp4", "video_path": "b.mp4", **llava(None, "What?")}, "field", "different videos"),
    "several videos in an item": ({"messages": [{"role": "user", "content": [{"type": "video", "video": ["a.mp4", "b.mp4"]}]}, {"role": "assistant", "content": "x"}]}, "clip", "2 clips"),
    "a sound": ({"audio": {"path": "a.wav"}, **llava(None, "What?")}, "media", "'audio'"),
    "an item of sound": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, {"role": "assistant", "content": "x"}]}, "message", "input_audio"),
    "a caption of nothing": ({"caption": "a box"}, "image-missing", "no image"),
    "a caption whose image is null": ({"image": None, "text": "a box"}, "image-missing", "no image"),
    "a question without answers": ({"question": "x", "answers": [], "image": "a.jpg", "text": "y"}, "no-answer", "no answer"),
    "history beside a conversation": ({"history": [["a", "b"]], **llava(None, "What?")}, "field", "'history'"),
    "options without a way to read the answer": ({"question": "x", "options": ["a", "b"], "answer": 1}, "field", "'1' is none of the 2 options"),
    "an answer that is no option": ({"question": "x", "options": ["a", "b"], "answer": "c"}, "field", "none of the 2 options"),
    "true as answer": ({"question": "x", "answer": True}, "message", "True"),
    "two fields of other images": ({"image": "a.jpg", "img": "b.jpg", "conversations": [ASK, TOLD]}, "field", "different images"),
    "images in two places": (
        {"images": ["b.jpg"], "messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}]}, {"role": "assistant", "content": "x"}]},
        "field", "in one place",
    ),
    "a context": ({"context": "It is red.", "question": "x", "answer": "y"}, "field", "'context'"),
    "thoughts of a turn": ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "reasoning_content": "hm"}]}, "field", "turn.*'reasoning_content'"),
    "tools": ({"tools": [{"name": "look"}], **llava(None, "What?")}, "field", "'tools'"),
    "a function call": ({"conversations": [ASK, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "7"}, TOLD]}, "message", "--tool-turns"),
    "a record of no weight": ({"weight": 0, **llava(None, "What?")}, "no-answer", "weight"),
    "only a turn of no weight": ({"conversations": [ASK, {**TOLD, "loss": False}]}, "no-answer", "nothing|no assistant"),
    "half a weight": ({"conversations": [ASK, {**TOLD, "weight": 0.5}]}, "field", "weight=0.5"),
    "a question to be learned": ({"conversations": [{**ASK, "loss": True}, TOLD]}, "field", "user turn"),
    "a turn with a sound": ({"conversations": [{**ASK, "audio": "a.wav"}, TOLD]}, "media", "turn.the field 'audio'"),
    "a document beside a turn": ({"conversations": [{**ASK, "files": ["a.pdf"]}, TOLD]}, "media", "turn.the field 'files'"),
    "a film by its name": ({"path": "a.mp4", "conversations": [ASK, TOLD]}, "media", "'path'"),
    "an image by its address": ({"coco_url": "https://far.away/a.jpg?x=1", "conversations": [ASK, TOLD]}, "field", "'coco_url' holds an image"),
    "an image in base64": ({"data": "iVBORw0KGgo" + "A" * 60, "conversations": [ASK, TOLD]}, "field", "'data' holds an image"),
    "an image within an item of text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image": "a.jpg"}]}, {"role": "assistant", "content": "y"}]},
        "field", "item.the field 'image'",
    ),
    "a crop of an item": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg", "bbox": [0, 0, 9, 9]}]}, {"role": "assistant", "content": "y"}]},
        "field", "item.the field 'bbox'",
    ),
    "an item of two images": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg", "url": "b.jpg"}]}, {"role": "assistant", "content": "y"}]},
        "field", "names 2 images",
    ),
    "a turn that says two things": ({"messages": [{"role": "user", "content": "x", "value": "z"}, {"role": "assistant", "content": "y"}]}, "field", "'value'"),
    "a question and its text": ({"question": "Who?", "text": "Anna came.", "answer": "Anna"}, "field", "'text'"),
    "two questions": ({"question": "What?", "prompt": "Think.", "answer": "a box"}, "field", "different texts"),
    "a conversation as one text": ({"image": "a.jpg", "caption": "x", "conversation": "Human: a AI: b"}, "field", "'conversation'"),
    "a right answer that is another": ({"question": "x", "answer": "y", "correct_answer": "z"}, "field", "'correct_answer'"),
    "an answer nobody wanted": ({"prompt": "x", "completion": "y", "label": False}, "no-answer", "'label'"),
    "a system turn behind an answer": ({"conversations": [ASK, TOLD, {"from": "system", "value": "Be rude."}, ASK, TOLD]}, "message", "behind an answer"),
    "an answer of no text": ({"conversations": [ASK, {"from": "gpt", "value": " "}, ASK, TOLD]}, "no-answer", "saying nothing"),
    "a lost image in another spelling": ({"question": "<image_1>\nWhat?", "answer": "x"}, "image-missing", "<image_1> where"),
    "a lost image in Markdown": ({"question": "![a box](a.png) What?", "answer": "x"}, "image-missing", "none came"),
    "a lost image in HTML": ({"question": "What?\n<img src='a.png'>", "answer": "x"}, "image-missing", "none came"),
    "numbered tags out of order": ({"images": ["a", "b"], "question": "<image_2> <image_1>", "answer": "x"}, "image-tags", "in order"),
}  # fmt: skip


@pytest.mark.parametrize("name", SKIPPED)
def test_what_cannot_be_said_or_shown_is_skipped_by_name(name):
    record, reason, part = SKIPPED[name]
    with pytest.raises(BadSample) as skipped:
        convert_record(record, "Describe.")
    assert skipped.value.reason == reason and re.search(part, skipped.value.detail), skipped.value.detail


@pytest.mark.parametrize("name", [*KEPT, *DROPPED])
def test_a_mark_that_takes_a_record_out_is_heeded_however_it_is_written(name):
    off = (False, 0, "false", "No") if name in KEPT else (True, 1, "true", "Yes")
    for value in off:
        with pytest.raises(BadSample, match=f"'{name}' says that the answer is not to be learned"):
            convert_record({"question": "x", "answer": "y", name: value}, "")
    on = (True, 1, "yes") if name in KEPT else (False, 0, "no")
    for value in on:
        assert convert_record({"question": "x", "answer": "y", name: value}, "").unread == (name,)


def test_turns_that_are_not_to_be_learned_stay_as_context():
    record = {"conversations": [ASK, {**TOLD, "weight": 0}, ASK, {**TOLD, "loss": True}]}
    assert [m.get("weight") for m in convert_record(record, "").messages] == [None, 0, None, None]


def test_function_calls_as_text():
    turns = [ASK, {"from": "function_call", "value": '{"name": "look"}'}, {"from": "observation", "value": "7"}, TOLD]
    record = {"tools": '[{"name": "look"}]', "conversations": turns}
    assert said(record, tool_turns="text") == [
        ("s", '[tools]\n[{"name": "look"}]'), ("u", "What?"), ("a", '[function_call]\n{"name": "look"}'), ("u", "[observation]\n7"), ("a", "a box"),
    ]  # fmt: skip
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "y"},
    ]
    assert said({"messages": messages}, tool_turns="text")[1:3] == [
        ("a", f"[function_call]\n{json.dumps([CALL])}"),
        ("u", "[tool]\n7"),
    ]


WORDS = iter(f"word{i}" for i in range(10**9))
COMPOUND = ("pre_prompt", "taskInstruction", "qa-pairs", "Chat History", "long_context", "personaText", "imageHints")
"""Names that no list has, of words that say something."""
UNKNOWN = ("notes", "Kommentar", "x1", "extra_field")
OTHERS = ("audios", "pdf", "audio", "audio_path", "point_cloud", "speech")


@st.composite
def records(draw):
    """(record, its words, its images): a conversation in some form, and other fields of every kind beside it."""
    word = lambda: next(WORDS)  # noqa: E731
    number = draw(st.integers(1, 3))
    form = draw(st.sampled_from(["messages", "conversations", "texts", "instruction", "question", "caption"]))
    pairs = [(word(), word()) for _ in range(number)]
    weigh = lambda: draw(st.sampled_from([{}, {}, {"weight": 1}, {"loss": False}]))  # noqa: E731
    record = {
        "messages": lambda: {"messages": [t for q, a in pairs for t in ({"role": "user", "content": q}, {"role": "assistant", "content": a, **weigh()})]},
        "conversations": lambda: {"conversations": [t for q, a in pairs for t in ({"from": "human", "value": q}, {"from": "gpt", "value": a, **weigh()})]},
        "texts": lambda: {"texts": [{"user": q, "assistant": a} for q, a in pairs]},
        "instruction": lambda: {"instruction": pairs[-1][0], "input": draw(st.sampled_from(["", word()])), "output": pairs[-1][1], "history": pairs[:-1]},
        "question": lambda: {"question": pairs[-1][0], "answer": pairs[-1][1]},
        "caption": lambda: {"caption": pairs[-1][1]},
    }[form]()  # fmt: skip
    for key in draw(
        st.lists(
            st.sampled_from([*sorted(CHANGES_THE_TEXT), *sorted(BOOKKEEPING), *COMPOUND, *UNKNOWN, *OTHERS]),
            max_size=3,
            unique=True,
        )
    ):
        record.setdefault(key, draw(st.sampled_from([None, "", word(), [word(), word()]])))
    shown = [f"{next(WORDS)}.jpg" for _ in range(draw(st.integers(0, 2)))]
    if shown:
        record[draw(st.sampled_from(IMAGE_KEYS))] = shown if len(shown) > 1 or draw(st.booleans()) else shown[0]
    return record, shown


@given(records())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_every_field_is_used_or_counted_or_leads_to_a_skip(case):
    record, shown = case
    try:
        made = convert_record(record, "Describe.")
    except BadSample as problem:
        assert problem.detail and "\n" not in problem.detail
        return
    text = " ".join(text_of(message) for message in made.messages)
    assert made.references == shown == shown[: text.count("[image]")]
    for key, value in record.items():
        words = re.findall(r"word\d+", json.dumps(value))
        if key in IMAGE_KEYS or key in BOOKKEEPING:
            continue
        times = [len(re.findall(rf"\b{word}\b", text)) for word in words]
        assert key not in OTHERS or not words
        assert all(number == 1 for number in times) or (key in made.unread and not any(times) and key in UNKNOWN), key
    answers = [m for m in made.messages if m["role"] == "assistant"]
    off = [t for t in record.get("messages", record.get("conversations", [])) if t.get("loss") is False]
    assert sum(m.get("weight") == 0 for m in answers) == len(off) < len(answers)


def test_unread_fields_are_counted_in_the_report(tmp_path, images):  # noqa: F811
    records = [llava(answer=str(i), notes="n", id=str(i), **({"width": 3} if i else {"mood": 7})) for i in range(3)]
    tally, _, _ = converted(tmp_path, records, images)
    assert tally.unread == {"notes": 3, "mood": 1}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["unread"] == {"notes": 3, "mood": 1}
    assert any(line.split() == ["unread", "3", "the", "field", "'notes'"] for line in tally.lines())


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


GREY = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
NOISE = Image.effect_noise((64, 48), 80).convert("RGB")


@pytest.mark.parametrize("top", [1, 255, 65535])
def test_floating_point_tiffs_keep_their_greys(top):
    data, extension, repairs = checked_image(encoded(Image.fromarray(GREY * top), "TIFF"), Limits())
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L"), float) / 255
    assert extension == "png" and "transcoded" in repairs and np.abs(pixels - GREY).max() < 0.003


@pytest.mark.parametrize("values", [GREY - 0.5, GREY * 1e6, GREY * np.nan])
def test_floating_point_tiffs_of_no_known_range_are_named(values):
    with pytest.raises(BadSample, match="values from .* wanted 0 to 1, 0 to 255 or 0 to 65535"):
        checked_image(encoded(Image.fromarray(values.astype(np.float32)), "TIFF"), Limits())


def test_a_phone_photo_with_a_second_one_behind_it_is_a_jpeg():
    data = encoded(NOISE, "MPO", save_all=True, append_images=[NOISE])
    kept, extension, _ = checked_image(data, Limits())
    assert kept == data and extension == "jpg"


def parquet_set(folder, files):
    """A dataset folder with a parquet file per name, each with one row that answers with the name."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist([{"question": "x", "answer": name}]), folder / name)
    return folder


def answers(folder, out, **chosen):
    convert("huggingface", folder, out, options=Options(limits=Limits(), **chosen))
    return [text_of(sample.messages[-1]) for sample in samples_of(out)]


def test_configurations_that_folders_tell_do_not_mix_by_themselves(tmp_path):
    names = ["chart/train-0.parquet", "chart/test/0.parquet", "ocr/train-0.parquet", "data/train-0.parquet"]
    folder = parquet_set(tmp_path / "set", names)
    held = (
        r"several configurations: without a name \(1 files\), chart \(2 files\), ocr \(1 files\); .* --subset chart, or"
    )
    with pytest.raises(UserError, match=held):
        answers(folder, tmp_path / "none")
    with pytest.raises(UserError, match=r"several splits: test \(1 files\), train \(1 files\)"):
        answers(folder, tmp_path / "none", subset="chart")
    with pytest.raises(UserError, match="--subset maps: "):
        answers(folder, tmp_path / "none", subset="maps")
    assert answers(folder, tmp_path / "a", subset="ocr") == ["ocr/train-0.parquet"]
    assert answers(folder, tmp_path / "b", subset="chart", split="test") == ["chart/test/0.parquet"]
    assert sorted(answers(folder, tmp_path / "c", subset="all", split="all")) == sorted(names)


README = """---
configs:
- config_name: easy
  data_files:
  - split: train
    path: parts/a*.parquet
  - split: held_out
    path: [parts/z.parquet]
- config_name: hard
  data_files: parts/b.parquet
---
# A set
"""


def test_configurations_that_the_readme_declares_go_before_names(tmp_path):
    names = ["parts/a1.parquet", "parts/a2.parquet", "parts/b.parquet", "parts/z.parquet", "parts/test-unused.parquet"]
    folder = parquet_set(tmp_path / "set", names)
    (folder / "README.md").write_text(README)
    with pytest.raises(UserError, match=r"several configurations: easy \(3 files\), hard \(1 files\)"):
        answers(folder, tmp_path / "none")
    assert answers(folder, tmp_path / "a", subset="easy", split="train") == names[:2]
    assert answers(folder, tmp_path / "b", subset="easy", split="held_out") == ["parts/z.parquet"]
    assert answers(folder, tmp_path / "c", subset="hard") == ["parts/b.parquet"]
    (folder / "README.md").write_text(README.replace("parts/b.parquet", "parts/c.parquet"))
    with pytest.raises(UserError, match=r"declares parts/c.parquet for hard \(train\), and no parquet file is there"):
        answers(folder, tmp_path / "none", subset="easy", split="train")
    for head in ("configs: 3", "configs: [{config_name: a}]", "a: [", "- x"):
        (folder / "README.md").write_text(f"---\n{head}\n---\n")
        with pytest.raises(UserError, match=r"several splits: without a name \(4 files\), test \(1 files\)"):
            answers(folder, tmp_path / "none", split="")


def test_heic_photos_are_read_where_the_decoder_is_installed(tmp_path):
    """What phones of one maker write: decoded, upright, and written as PNG."""
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    data = encoded(NOISE, "HEIF", quality=100)
    assert data[4:8] == b"ftyp"
    kept, extension, repairs = checked_image(data, Limits())
    difference = np.asarray(Image.open(io.BytesIO(kept)).convert("RGB"), float) - np.asarray(NOISE, float)
    assert extension == "png" and "transcoded" in repairs and np.abs(difference).mean() < 12
    (tmp_path / "photo.heic").write_bytes(data)
    tally, (sample,), _ = converted(tmp_path, [llava("photo.heic")], tmp_path)
    assert tally.num_good == 1 and sample.images == [kept]


def test_avif_is_read_where_there_is_a_decoder_and_named_where_not(monkeypatch):
    if "AVIF" not in Image.SAVE:
        Image.init()
    data = encoded(NOISE, "AVIF", quality=100)
    kept, extension, repairs = checked_image(data, Limits())
    difference = np.asarray(Image.open(io.BytesIO(kept)).convert("RGB"), float) - np.asarray(NOISE, float)
    assert extension == "png" and "transcoded" in repairs and np.abs(difference).mean() < 12
    monkeypatch.setattr("tokenflex.prepare.convert.images._formats", lambda: ["GIF"])
    with pytest.raises(BadSample, match="AVIF image, which is read with a Pillow"):
        checked_image(data, Limits())
    monkeypatch.setattr("tokenflex.prepare.convert.images.pillow_heif", None)
    with pytest.raises(BadSample, match="HEIF image, which is read with the package pillow-heif"):
        checked_image(b"\0\0\0\x18ftypheic" + bytes(40), Limits())


def test_backslashes_in_paths(tmp_path, images):  # noqa: F811
    _, (sample,), _ = converted(tmp_path, [llava("sub\\c.jpg")], images)
    assert sample.images == [(images / "sub" / "c.jpg").read_bytes()]


def test_files_in_utf_16_or_compressed_are_named(tmp_path):
    for data, part in (
        (json.dumps([llava(None, "What?")]).encode("utf-16"), "UTF-16.*iconv"),
        (json.dumps([llava(None, "What?")]).encode("utf-16-le"), "UTF-16"),
        (b"\x1f\x8b\x08", "compressed"),
    ):
        (tmp_path / "x.json").write_bytes(data)
        with pytest.raises(UserError, match=part):
            convert("llava", tmp_path / "x.json", tmp_path / "out", options=PLAIN)


def test_objects_on_several_lines_are_records_each(tmp_path):
    for number in (1, 3):
        path = tmp_path / f"{number}.json"
        path.write_text("\n".join(json.dumps(llava(None, "What?", answer=f"{{{i}\n"), indent=2) for i in range(number)))
        convert("llava", path, tmp_path / f"out{number}", options=PLAIN)
        assert [text_of(s.messages[1]) for s in samples_of(tmp_path / f"out{number}")] == [
            f"{{{i}\n" for i in range(number)
        ]
    path.write_text('{"broken\n' + "\n".join(json.dumps(llava(None, "What?", answer=str(i))) for i in range(3)))
    tally = convert("llava", path, tmp_path / "lines", options=PLAIN)
    assert tally.num_good == 3 and tally.skipped == {"json": 1}


def test_a_conversion_that_keeps_nothing_says_so_and_fails(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"data": [llava(None)]}, indent=1))
    end = run_cli("convert", "llava", path, "--out", tmp_path / "out")
    assert end.returncode == 2 and end.stderr.count("\n") == 1
    assert re.search(r"none of 1 records was kept; the first, record 1: holds the keys \['data'\]", end.stderr), (
        end.stderr
    )


def test_media_beside_a_caption_in_plain_shards(tmp_path):
    import webdataset

    shard = tmp_path / "in.tar"
    with webdataset.TarWriter(str(shard), encoder=False) as writer:
        writer.write({"__key__": "a", "avif": encoded(NOISE, "AVIF"), "txt": b"noise"})
        writer.write({"__key__": "b", "txt": b"of nothing"})
        writer.write({"__key__": "c", "mp4": b"....", "txt": b"a film"})
        writer.write(
            {
                "__key__": "d",
                "jpg": picture(),
                "json": json.dumps({"caption": "x", "image": "there.jpg", "cls": 3}).encode(),
            }
        )
    tally = convert("webdataset", str(shard), tmp_path / "out", options=PLAIN)
    assert [[text_of(m) for m in s.messages][1] for s in samples_of(tmp_path / "out")] == ["noise", "x"]
    assert tally.skipped == {"image-missing": 1, "clip": 1} and tally.unread == {"cls": 1}


def test_splits_do_not_mix_by_themselves(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        parquet.write_table(pa.Table.from_pylist([{"question": "x", "answer": name}]), folder / f"{name}.parquet")
    with pytest.raises(UserError, match=r"several splits: train \(2 files\), validation \(1 files\); .* --split train"):
        convert("huggingface", tmp_path / "set", tmp_path / "none", options=PLAIN)
    with pytest.raises(UserError, match="--split test: "):
        convert("huggingface", tmp_path / "set", tmp_path / "none", options=Options(limits=Limits(), split="test"))
    for split, number in (("train", 2), ("validation", 1), ("all", 3)):
        assert (
            convert(
                "huggingface", tmp_path / "set", tmp_path / split, options=Options(limits=Limits(), split=split)
            ).num_good
            == number
        )
