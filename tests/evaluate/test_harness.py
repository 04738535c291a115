"""An export under lmms-eval and VLMEvalKit: their formats in, `Generator`'s answers out, at the count that was asked for.

lmms-eval is the package itself where it is there (`make test-evaluators`), and else its interface as its sources state it: `LMMS`
below, and `VLMEVAL` for VLMEvalKit, which `test_vlmevalkit.py` runs itself.
"""

import importlib
import importlib.util
import json
import re
import sys
import types
from dataclasses import dataclass

import pytest
from conftest import ROOT
from PIL import Image

from tokenflex.errors import UserError
from tokenflex.evaluate.harness import Asker
from tokenflex.infer import Generator

QUESTIONS = ["Which colour is it?", "What is written in the image?"]

LMMS = """
class lmms:
    is_simple = True
    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = CacheHook()
class CacheHook:
    def __init__(self):
        self.kept = []
    def add_partial(self, attr, req, res):
        self.kept.append((attr, req, res))
"""
VLMEVAL = """
class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]
    def use_custom_prompt(self, dataset):
        return False
    def generate(self, message, dataset=None):
        assert isinstance(message, list) and all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (64, 48), colour).save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(2)]


@pytest.fixture(scope="module")
def generator(telling_export):
    return Generator(telling_export)


def module(name, code="", **values):
    made = types.ModuleType(name)
    exec(code, made.__dict__)
    made.__dict__.update(values)
    return made


@pytest.fixture(params=["stated", "installed"])
def lmms_model(request, monkeypatch):
    """The class that lmms-eval finds through the entry point."""
    if request.param == "installed":
        if importlib.util.find_spec("lmms_eval") is None:
            pytest.skip("lmms-eval is not installed; make test-evaluators")
        from lmms_eval.models.registry_v2 import ModelRegistryV2
    else:
        manifest = dataclass(frozen=True)(
            type("ModelManifest", (), {"__annotations__": {"model_id": str, "chat_class_path": str}})
        )
        monkeypatch.setitem(sys.modules, "lmms_eval", module("lmms_eval"))
        for name, code, values in (
            ("api", "", {}),
            ("api.model", LMMS, {}),
            ("models", "", {}),
            ("models.registry_v2", "", {"ModelManifest": manifest}),
        ):
            monkeypatch.setitem(sys.modules, f"lmms_eval.{name}", module(name, code, **values))
    monkeypatch.delitem(sys.modules, "tokenflex.evaluate.harness.lmms_model", raising=False)
    entry = re.search(
        r'entry-points\."lmms_eval\.models"\]\n(\w+) = "(.+):(.+)"', (ROOT / "pyproject.toml").read_text()
    )
    payload = getattr(importlib.import_module(entry[2]), entry[3])()
    assert payload.model_id == entry[1] == "tokenflex"
    if request.param == "installed":
        registry = ModelRegistryV2()
        registry.register_manifest(payload)
        yield registry.get_model_class("tokenflex")  # checks the class' kind
    else:
        place, name = payload.chat_class_path.rsplit(".", 1)
        yield getattr(importlib.import_module(place), name)
    sys.modules.pop("tokenflex.evaluate.harness.lmms_model", None)


@dataclass
class Request:
    args: tuple


def requests_of(pictures):
    """Two tasks' documents as `generate_until` gets them: choices with one image, a question about two."""

    def choice(document):
        text = {"type": "text", "text": document["question"]}
        return [{"role": "user", "content": [{"type": "image", "url": document["image"]}, text]}]

    def pair(document):
        images = [{"type": "image", "url": image} for image in document["images"]]
        return [{"role": "user", "content": [*images, {"type": "text", "text": document["query"]}]}]

    opened = [Image.open(picture) for picture in pictures]
    tasks = {
        "choices": {"val": [{"question": QUESTIONS[0], "image": image} for image in opened]},
        "pairs": {"test": [{"query": QUESTIONS[1], "images": opened}]},
    }
    greedy = {"max_new_tokens": 8, "until": ["\n\n"], "do_sample": False}
    requests = [Request(("", choice, {"max_new_tokens": 8}, number, "choices", "val")) for number in range(2)]
    return tasks, [*requests, Request(("", pair, greedy, 0, "pairs", "test"))]


@pytest.mark.parametrize("count, batch_size", [(None, 1), (4, 2), ("2x3", 8)])
def test_lmms_eval_gets_the_generators_answers(count, batch_size, lmms_model, telling_export, generator, pictures):
    model = lmms_model(pretrained=str(telling_export), num_visual_tokens=count, batch_size=batch_size, device="cuda:0")
    tasks, requests = requests_of(pictures)
    model.task_dict = tasks
    wanted = (2, 3) if count == "2x3" else count
    expected = [generator(QUESTIONS[0], [picture], wanted, 8) for picture in pictures]
    expected.append(generator(QUESTIONS[1], pictures, wanted, 8).partition("\n\n")[0])
    assert model.generate_until(requests) == expected and len(set(expected)) == 3


def test_lmms_eval_has_the_routers_count(lmms_model, telling_export, generator, pictures):
    model = lmms_model(pretrained=str(telling_export), num_visual_tokens="auto", batch_size=2)
    model.task_dict, (*choices, _) = requests_of(pictures)
    assert model.generate_until(choices) == [generator(QUESTIONS[0], [picture], 4, 8) for picture in pictures]


def test_lmms_eval_is_told_what_is_not_done(lmms_model, tiny_export, pictures):
    for wrong, message in (
        ({"num_visual_tokens": "auto"}, "no router"),
        ({"num_visual_tokens": "4,9"}, "run it once per count"),
        ({"max_pixels": 5}, "--model_args max_pixels: not known"),
        ({"batch_size": "auto"}, "--batch_size auto"),
    ):
        with pytest.raises(UserError, match=message):
            lmms_model(pretrained=str(tiny_export), **wrong)
    model = lmms_model(pretrained=str(tiny_export))
    film = lambda document: [{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}]  # noqa: E731
    model.task_dict = {"films": {"test": [{}]}}
    with pytest.raises(UserError, match="holds video, which this model does not take"):
        model.generate_until([Request(("", film, {}, 0, "films", "test"))])
    with pytest.raises(UserError, match="score given answers"):
        model.loglikelihood([])


def test_a_stop_text_ends_an_answer(telling_export, pictures):
    asker = Asker(telling_export, 4)
    talk = [{"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "?"}]}]
    (whole,) = asker.answers([talk], 40)
    stop = whole[len(whole) // 2 :][:2]
    assert asker.answers([talk, talk], 40, stop=["\u2603", stop]) == [whole[: whole.find(stop)].rstrip()] * 2


def test_vlmevalkit_runs_its_program_on_every_count(telling_export, generator, pictures, tmp_path, monkeypatch):
    """Two of its formats: an image before its question, and texts and images in turn."""
    from tokenflex.evaluate.harness import vlmevalkit

    supported = {}
    for name, code, values in (("", "", {}), (".vlm", "", {}), (".vlm.base", VLMEVAL, {}), (".config", "", {})):
        monkeypatch.setitem(sys.modules, f"vlmeval{name}", module(name, code, **values))
    sys.modules["vlmeval.config"].supported_VLM = supported
    messages = [
        [{"type": "image", "value": str(pictures[0])}, {"type": "text", "value": QUESTIONS[0]}],
        [
            {"type": "text", "value": "First:"},
            {"type": "image", "value": str(pictures[0])},
            {"type": "text", "value": "Second:"},
            {"type": "image", "value": str(pictures[1])},
            {"type": "text", "value": QUESTIONS[1]},
        ],
    ]
    program = tmp_path / "run.py"
    program.write_text(
        "import json, sys\n"
        "from vlmeval.config import supported_VLM\n"
        "out, names, asked = sys.argv[-2], sys.argv[2:-3], json.loads(sys.argv[-1])\n"
        "models = {name: supported_VLM[name]() for name in names}\n"
        "assert all(model.INTERLEAVE and 'video' not in model.allowed_types for model in models.values())\n"
        "answers = {name: [model.generate(message, 'X') for message in asked] for name, model in models.items()}\n"
        "open(out, 'w').write(json.dumps(answers))\n"
    )
    out = tmp_path / "answers.json"
    monkeypatch.setattr(sys, "argv", ["python"])
    counts = ["--pretrained", str(telling_export), "--num-visual-tokens", "4,2x3,auto", "--max-new-tokens", "8"]
    vlmevalkit.main([str(program), *counts, "--", "--data", str(out), json.dumps(messages)])
    answers = json.loads(out.read_text())
    assert list(answers) == ["tokenflex-4", "tokenflex-2x3", "tokenflex-auto"] == list(supported)
    for name, count in (("tokenflex-4", 4), ("tokenflex-2x3", (2, 3)), ("tokenflex-auto", 4)):
        first = generator(QUESTIONS[0], pictures[:1], count, 8)
        turns = [{"type": item["type"], item["type"]: item["value"]} for item in messages[1]]
        inputs = generator.inputs([{"role": "user", "content": turns}], count)
        output = generator.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        second = generator.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert answers[name] == [first, second] and first != second
    assert answers["tokenflex-4"] != answers["tokenflex-2x3"]


def test_vlmevalkit_is_not_begun_with_what_cannot_be_asked(tiny_export, tmp_path):
    """Its own program would log the same error for every benchmark and end with status 0."""
    from tokenflex.evaluate.harness import vlmevalkit

    (tmp_path / "run.py").touch()
    for folder, counts, message in (
        (tmp_path, "4", "no exported model"),
        (tiny_export, "4,many", "'many' is no count"),
        (tiny_export, "4,auto", "no router"),
    ):
        with pytest.raises(UserError, match=message):
            vlmevalkit.main(
                [str(tmp_path / "run.py"), "--pretrained", str(folder), "--num-visual-tokens", counts, "--"]
            )


def test_vlmevalkit_that_is_not_there_is_told_in_one_line(tiny_export, tmp_path):
    from tokenflex.evaluate.harness import vlmevalkit

    options = ["--pretrained", str(tiny_export), "--num-visual-tokens", "4"]
    with pytest.raises(SystemExit, match="no such file"):
        vlmevalkit.main([str(tmp_path / "run.py"), *options])
    if importlib.util.find_spec("vlmeval") is None:
        (tmp_path / "run.py").touch()
        with pytest.raises(SystemExit, match="vlmeval is not installed"):
            vlmevalkit.main([str(tmp_path / "run.py"), *options])
