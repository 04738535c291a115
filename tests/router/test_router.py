"""The router: choices grow with the effort, "auto" is a number before anything runs, and an export carries it anywhere."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import STRANGER
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenflex.config import BudgetConfig
from tokenflex.data import Limits, find_shards
from tokenflex.data.shards import as_shards
from tokenflex.errors import UserError
from tokenflex.evaluate import Answers, evaluate_model, hits
from tokenflex.evaluate.questions import read_questions
from tokenflex.export import export_model
from tokenflex.infer import Generator, check_auto, parse_num_visual_tokens
from tokenflex.layout import RunLayout
from tokenflex.model import build_model, build_processor
from tokenflex.model.router import CountRouter, question_mask
from tokenflex.router import (
    Asked,
    FitSettings,
    Measured,
    ask,
    ask_teacher_forced,
    evaluate_router,
    fit_router,
    give_router,
    measure,
    rows_of,
    train_router,
)
from tokenflex.router.evaluate import EFFORTS
from tokenflex.router.fit import calibrate, likelihoods
from tokenflex.router.policies import accuracy_at, cascade

QUICK = FitSettings(hidden_size=8, max_epochs=3)
SMALL = FitSettings(hidden_size=16, max_epochs=30, batch_size=64, learning_rate=5e-3)
COUNTS = [4, 12]


@pytest.fixture(scope="module")
def bare(tiny_export, tmp_path_factory):
    """Folder of an exported model without a router."""
    folder = shutil.copytree(tiny_export, tmp_path_factory.mktemp("bare") / "model")
    (folder / "notes.txt").write_text("kept")
    return folder


@pytest.fixture(scope="module")
def routed(bare, tiny_config, tmp_path_factory):
    """Folder of the same export with a router of three epochs."""
    folder = tmp_path_factory.mktemp("routed") / "model"
    train_router(bare, tiny_config, lambda text: None, QUICK, 24, folder)
    return folder


@pytest.fixture(scope="module")
def samples(corpus):
    shards = as_shards(find_shards([str(corpus / "eval")]))
    return [sample for sample in read_questions(shards, 2, Limits()).samples if sample.images]


@pytest.fixture(scope="module")
def choosy(routed, processor, samples):
    """A model whose router, by weights drawn at random, gives images and questions different counts at the effort 0.5."""
    model = AutoModelForImageTextToText.from_pretrained(routed).eval()
    _let_disagree(model, measure(model, processor, samples, COUNTS, 8).features)
    return model


def _let_disagree(model, features):
    """Give a model's router weights drawn at random, standardised and priced by these features."""
    torch.manual_seed(3)
    for weight in (model.router.hidden.weight, model.router.out.weight):
        torch.nn.init.normal_(weight, std=1.0)
    model.router.center.copy_(features.mean(0))
    model.router.scale.copy_(features.std(0).clamp(min=1e-4))
    calibrate(model.router, features, torch.ones(len(features), 2))


def prompts(processor, samples, **options):
    conversations = [sample.messages_with_images()[:-1] for sample in samples]
    return processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True, **options)


class Calls:
    """How many tiles the vision encoder of a model is given within a block, call by call."""

    def __init__(self, model):
        self.model, self.tiles = model, []

    def __enter__(self):
        note = lambda module, args, kwargs: self.tiles.append(len((*args, *kwargs.values())[0]))  # noqa: E731
        self.hook = self.model.vision_tower.register_forward_pre_hook(note, with_kwargs=True)
        return self.tiles

    def __exit__(self, *error):
        self.hook.remove()


def test_no_image_gets_less_at_a_higher_effort():
    torch.manual_seed(0)
    router = CountRouter(10, [4, 9, 25, 64], 16)
    torch.nn.init.normal_(router.out.weight)
    features = torch.randn(300, 10)
    calibrate(router, features, torch.rand(300, 4))
    chosen = np.array([router.choose(features, effort) for effort in np.linspace(0, 1, 41).tolist()])
    assert (np.diff(chosen, axis=0) >= 0).all() and set(chosen[0]) == {4} and set(chosen[-1]) == {64}
    means = chosen.mean(1)
    assert np.abs(means - np.linspace(4, 64, 41)).max() < 1.5  # what an effort says of its cost
    assert len(set(chosen[20])) > 1


def test_a_router_learns_which_images_need_much_and_keeps_what_they_gain():
    torch.manual_seed(0)
    features = torch.randn(800, 6)
    needs = features[:, 2] > 0.5
    losses = torch.stack([torch.where(needs, 2.0, 0.1), torch.full((800,), 0.1)], 1)
    measured = Measured(features, losses, losses < 1, torch.arange(800) // 2, [""] * 400)
    fitted = fit_router(measured, [4, 64], SMALL)
    assert fitted.held_out_loss < 0.9 * fitted.constant_loss and fitted.num_rows == 640
    chosen = torch.tensor(fitted.router.choose(features, fitted.effort))
    kept = likelihoods(losses).gather(1, (chosen == 64).long().unsqueeze(1)).mean() / likelihoods(losses)[:, 1].mean()
    assert kept > 0.98 and float((chosen == 64).float().mean()) < float(needs.float().mean()) + 0.05
    again = fit_router(measured, [4, 64], SMALL)
    assert all(
        torch.equal(a, b) for a, b in zip(fitted.router.state_dict().values(), again.router.state_dict().values())
    )


def test_what_says_nothing_teaches_nothing():
    torch.manual_seed(0)
    measured = Measured(torch.randn(600, 6), torch.rand(600, 2), torch.ones(600, 2), torch.arange(600), [""] * 600)
    fitted = fit_router(measured, [4, 64], SMALL)
    assert fitted.held_out_loss > 0.98 * fitted.constant_loss


def test_one_conversation_is_too_few():
    measured = Measured(torch.randn(2, 6), torch.rand(2, 2), torch.ones(2, 2), torch.zeros(2), [""])
    with pytest.raises(ValueError, match="1 conversations are too few"):
        fit_router(measured, [4, 64], QUICK)


@pytest.mark.parametrize("ids, wanted", [
    ([7, 8, 1, 5, 5, 5, 2, 9, 0, 7], [1, 1, 0, 0, 0, 0, 0, 1, 1, 1]),  # 1, 5, 2: an image; one turn has ended
    ([7, 8, 0, 9, 9, 0, 7], [0, 0, 0, 1, 1, 1, 1]),  # a system turn, a question
    ([7, 0, 9, 0, 6, 0, 8, 0, 7], [0, 0, 0, 0, 0, 0, 1, 1, 1]),  # the last of several
    ([7, 8], [1, 1]),
])  # fmt: skip
def test_the_question_is_the_last_turn_that_ended(ids, wanted):
    mask = torch.tensor([[0, 0, *[1] * len(ids)]])
    found = question_mask(torch.tensor([[0, 0, *ids]]), mask, (1, 5, 2), [0])
    assert found.long().tolist() == [[0, 0, *wanted]]


def test_measured_losses_are_the_models_own_and_the_encoder_runs_once(choosy, processor, corpus):
    shard = as_shards(find_shards([str(corpus / "train")]))[0]
    several = [scanned.whole for scanned in shard.scan(Limits())]
    several = [sample for sample in several if sample.images][:5]
    assert any(len(sample.messages) > 2 for sample in several)
    with Calls(choosy) as calls:
        measured = measure(choosy, processor, several, COUNTS, 3)
    assert sum(calls) == sum(len(sample.images) for sample in several) and len(calls) == 2
    row = 0
    for number, sample in enumerate(several):
        for place in range(1, len(sample.messages), 2):
            messages = sample.messages_with_images()[: place + 1]
            for column, count in enumerate(COUNTS):
                inputs = processor.apply_chat_template(
                    [messages], tokenize=True, num_visual_tokens=count, return_assistant_tokens_mask=True
                )
                learned = inputs.pop("assistant_masks").bool()
                last = learned & (learned.long().flip(1).cumsum(1).flip(1) <= _last_run(learned))
                with torch.no_grad():
                    loss = choosy(**inputs, labels=inputs["input_ids"].masked_fill(~last, -100)).loss
                torch.testing.assert_close(measured.losses[row, column], loss, atol=2e-5, rtol=1e-4)
            prompt = processor.apply_chat_template([messages[:-1]], tokenize=True, add_generation_prompt=True)
            features = choosy.router_features(
                prompt["input_ids"], prompt["pixel_values"], prompt["attention_mask"], prompt["num_tiles"]
            )
            images = len(features)
            torch.testing.assert_close(measured.features[row : row + images], features, atol=1e-5, rtol=1e-4)
            assert (measured.samples[row : row + images] == number).all()
            row += images
    assert row == len(measured.losses)


def _last_run(learned):
    """Length of the last run of True in a row."""
    row = learned[0].tolist()
    end = len(row) - row[::-1].index(True)
    begin = end
    while begin and row[begin - 1]:
        begin -= 1
    return end - begin


def test_the_router_shares_a_total_among_the_images_of_a_row(choosy, processor, samples):
    """Every row for itself, at the largest effort with which its images fit, and never at more than was asked for."""
    one, two = (next(s for s in samples if len(s.images) == number) for number in (1, 2))
    talks = [sample.messages_with_images()[:-1] for sample in (one, two)]
    inputs = processor.apply_chat_template(talks, tokenize=True, add_generation_prompt=True)
    seen = {name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask", "num_tiles")}
    for total in (8, 16, 23, 24, 100):
        chosen = choosy.choose_num_visual_tokens(**seen, effort=1, total_visual_tokens=total)
        assert chosen[0] == (12 if total >= 12 else 4) and sum(chosen[1:]) <= total
        assert total < 24 or chosen[1:] == [12, 12]
        free = choosy.choose_num_visual_tokens(**seen, effort=0.5)
        held = choosy.choose_num_visual_tokens(**seen, effort=0.5, total_visual_tokens=total)
        assert all(own <= other for own, other in zip(held, free))
    with pytest.raises(ValueError, match="total_visual_tokens=7: 2 images .* 8 visual tokens at the least"):
        choosy.choose_num_visual_tokens(**seen, total_visual_tokens=7)
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pytest.raises(ValueError, match="that is for the router"):
        choosy.generate(**inputs, num_visual_tokens=4, total_visual_tokens=16, **options)
    with pytest.raises(ValueError, match="the router shares a total among all images"):
        choosy.generate(**inputs, num_visual_tokens=["auto", 4, 4], total_visual_tokens=16, **options)
    shared = choosy.generate(**inputs, num_visual_tokens="auto", effort=1, total_visual_tokens=16, **options)
    chosen = choosy.choose_num_visual_tokens(**seen, effort=1, total_visual_tokens=16)
    assert torch.equal(shared, choosy.generate(**inputs, num_visual_tokens=chosen, **options))


def test_the_generator_shares_a_total_as_it_is_asked_to(routed, samples):
    generator = Generator(routed)
    talk = next(sample for sample in samples if len(sample.images) == 2).messages_with_images()[:-1]
    runs = lambda *options: int(
        (generator.inputs(talk, *options)["input_ids"] == generator.processor.image_token_id).sum()
    )  # noqa: E731
    assert runs(None, None, 24) == 24 and runs(None, None, 23) == runs(None, None, 23, "size") == 8
    assert runs("auto", 1, 24) == runs(None, 1, 24, "router") == 24 and runs(None, 1, 15, "router") == 8
    for options, why in (
        ((None, None, 7), "total_visual_tokens=7: 2 images"),
        ((None, None, 7, "router"), "total_visual_tokens=7: 2 images"),
        ((None, None, None, "router"), "--share router: .* give --total-visual-tokens"),
        ((4, None, 16, "router"), "--share router: .* and no counts"),
        (("auto", None, 16, "even"), "--share even with --num-visual-tokens auto"),
        ((None, None, None, "size"), "is of a total, and there is none"),
    ):
        with pytest.raises(UserError, match=why):
            runs(*options)
    generator.processor.total_visual_tokens = 7  # as of training, for a call that names neither counts nor a total
    assert runs("auto", 1, 24) == runs("auto", 1, 0) == runs("auto", 1) == 24


def test_auto_is_the_chosen_numbers_per_image_and_row(choosy, processor, samples):
    """Answers of a batch at "auto" are those at its numbers, whatever count the prompt was built with; rows are as alone."""
    some = samples[:10]
    assert any(len(sample.images) > 1 for sample in some)
    inputs = prompts(processor, some, num_visual_tokens=12)
    names = ("input_ids", "pixel_values", "attention_mask", "num_tiles")
    by_effort = {
        effort: choosy.choose_num_visual_tokens(*[inputs[name] for name in names], effort=effort)
        for effort in np.linspace(0.05, 0.95, 19).tolist()
    }
    effort, chosen = next((effort, chosen) for effort, chosen in by_effort.items() if set(chosen) == set(COUNTS))
    alone = []
    for sample in some:
        one = prompts(processor, [sample], num_visual_tokens=4)
        alone += choosy.choose_num_visual_tokens(*[one[name] for name in names], effort=effort)
    assert alone == chosen
    wanted = choosy.generate(**inputs, num_visual_tokens=chosen, max_new_tokens=4, do_sample=False)
    with Calls(choosy) as calls:
        found = choosy.generate(**inputs, num_visual_tokens="auto", effort=effort, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, wanted) and calls == [len(chosen)]
    once = {**inputs, "pixel_values": choosy.encode_images(inputs["pixel_values"])}
    with Calls(choosy) as calls:
        found = choosy.generate(
            **once, num_visual_tokens="auto", effort=effort, num_beams=2, max_new_tokens=3, do_sample=False
        )
    beams = choosy.generate(**once, num_visual_tokens=chosen, num_beams=2, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, beams) and calls == []
    mixed = [12, *["auto"] * (len(chosen) - 1)]
    found = choosy.generate(**once, num_visual_tokens=mixed, effort=effort, max_new_tokens=3, do_sample=False)
    wanted = choosy.generate(**once, num_visual_tokens=[12, *chosen[1:]], max_new_tokens=3, do_sample=False)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("sides", ["square", "aspect"])
def test_auto_in_a_batch_with_tiles_is_each_prompt_alone(tiny_config, sides, tmp_path):
    """Wide, tall and small images, one and several in a prompt and none: choices and answers are those of single calls."""
    budget = tiny_config.budget.model_copy(update={"sides": sides})
    model_config = tiny_config.model.model_copy(update={"max_tiles": 4})
    processor = build_processor(model_config, budget)
    torch.manual_seed(5)
    model = build_model(model_config, budget, processor, torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    export_model(model, dict(model.state_dict()), processor, tmp_path / "bare")
    config = tiny_config.model_copy(update={"model": model_config, "budget": budget})
    train_router(tmp_path / "bare", config, lambda text: None, QUICK, 12)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "bare").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "bare")
    sizes = [[(64, 48)], [(210, 50), (50, 150)], [], [(130, 100), (64, 48), (260, 60)]]
    images = [
        [Image.effect_noise(size, 70 + 20 * place).convert("RGB") for place, size in enumerate(row)] for row in sizes
    ]
    asked = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": one} for one in row),
                    {"type": "text", "text": f"digit at A{n}"},
                ],
            }
        ]
        for n, row in enumerate(images)
    ]
    inputs = processor.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)
    assert sorted(set(inputs["num_tiles"].tolist()))[-1] > 2
    _let_disagree(model, model.router_features(**_seen(inputs)))
    chosen = {effort: model.choose_num_visual_tokens(**_seen(inputs), effort=effort) for effort in EFFORTS}
    effort = next(effort for effort, counts in chosen.items() if len(set(counts)) > 1)
    alone = [processor.apply_chat_template([one], tokenize=True, add_generation_prompt=True) for one in asked]
    by_row = [
        model.choose_num_visual_tokens(**_seen(one), effort=effort) if "num_tiles" in one else [] for one in alone
    ]
    assert [count for row in by_row for count in row] == chosen[effort]
    with Calls(model) as calls:
        logits = _logits(model, inputs, num_visual_tokens="auto", effort=effort)
    assert calls == [int(inputs["num_tiles"].sum())]
    torch.testing.assert_close(logits, _logits(model, inputs, num_visual_tokens=chosen[effort]), rtol=0, atol=0)
    for number, (one, counts) in enumerate(zip(alone, by_row)):
        ways = [{"num_visual_tokens": "auto", "effort": effort}, {"num_visual_tokens": counts} if counts else {}]
        for options in ways:
            torch.testing.assert_close(_logits(model, one, **options), logits[number : number + 1])
        if counts:
            others = [sum(COUNTS) - count for count in counts]
            assert (_logits(model, one, num_visual_tokens=others) - logits[number]).abs().max() > 0.01


def _seen(inputs):
    return {name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask", "num_tiles")}


def _logits(model, inputs, **options):
    """[B, steps, vocabulary] of an answer's first tokens."""
    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "output_logits": True}
    output = model.generate(**inputs, **options, **settings, return_dict_in_generate=True)
    return torch.stack(output.logits, dim=1)


def test_an_endpoint_gives_each_request_the_routers_count(routed, processor, samples):
    """What serves requests renders prompts at the chosen numbers, so tokens are counted as they are; no second pass."""
    from tokenflex.infer import Generator

    generator = Generator(routed)
    messages = samples[0].messages_with_images()[:-1]
    for effort, count in ((0.0, 4), (1.0, 12)):
        inputs = generator.inputs(messages, "auto", effort)
        images = len(samples[0].images)
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == count * images
        assert inputs["pixel_values"].dim() == 3  # features, which the router and the answer share
    with pytest.raises(UserError, match="--effort 0.5 is for --num-visual-tokens auto"):
        generator.inputs(messages, 4, 0.5)


def test_the_question_counts(choosy, processor, samples):
    """The same image asked many things is not given one count."""
    image = samples[0].messages_with_images()[0]["content"][0]
    asked = [
        [{"role": "user", "content": [image, {"type": "text", "text": f"digit at {c}{n}"}]}]
        for c in "ABCD"
        for n in "1234"
    ]
    inputs = processor.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)
    inputs["pixel_values"] = choosy.encode_images(inputs["pixel_values"])
    chosen = {
        tuple(choosy.choose_num_visual_tokens(**inputs, effort=effort))
        for effort in np.linspace(0.05, 0.95, 19).tolist()
    }
    assert any(len(set(counts)) == 2 for counts in chosen)


def test_text_alone_needs_no_choice(choosy, processor):
    asked = [[{"role": "user", "content": "larger of 2 1"}]]
    inputs = processor.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)
    plain = choosy.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(choosy.generate(**inputs, num_visual_tokens="auto", max_new_tokens=3, do_sample=False), plain)


def test_a_choice_costs_less_than_a_hundredth_of_a_forward(choosy, processor, samples):
    inputs = prompts(processor, samples[:1], num_visual_tokens=4)
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        choosy(**inputs)
    inputs["pixel_values"] = choosy.encode_images(inputs["pixel_values"])
    with FlopCounterMode(display=False) as choice:
        choosy.choose_num_visual_tokens(**inputs, effort=0.5)
    assert 0 < choice.get_total_flops() < 0.01 * whole.get_total_flops()


def test_the_export_is_the_same_model_and_loads_anywhere(bare, routed, choosy, processor, samples, tmp_path):
    before, after = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (bare, routed))
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, after.state_dict()[name]), name
    assert (routed / "notes.txt").read_text() == "kept" and "auto" in (routed / "README.md").read_text()
    assert not before.config.router and 0 <= after.config.router["effort"] <= 1
    half = AutoModelForImageTextToText.from_pretrained(routed, dtype=torch.bfloat16)
    assert half.projector.down.weight.dtype == torch.bfloat16 and half.router.out.weight.dtype == torch.float32
    assert all(
        torch.equal(weight, after.router.state_dict()[name]) for name, weight in half.router.state_dict().items()
    )
    folder = tmp_path / "model"
    choosy.save_pretrained(folder)
    processor.save_pretrained(folder)
    torch.save(dict(prompts(processor, samples[:6])), tmp_path / "inputs.pt")
    code = STRANGER + (
        "inputs = torch.load(rest[0])\n"
        "options = {'max_new_tokens': 4, 'do_sample': False}\n"
        "chosen = model.choose_num_visual_tokens(**inputs, effort=0.5)\n"
        "same = torch.equal(model.generate(**inputs, num_visual_tokens='auto', effort=0.5, **options),\n"
        "    model.generate(**inputs, num_visual_tokens=chosen, **options))\n"
        "print(json.dumps([chosen, same]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "inputs.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = choosy.choose_num_visual_tokens(**torch.load(tmp_path / "inputs.pt"), effort=0.5)
    assert json.loads(done.stdout) == [chosen, True]


def test_the_router_may_be_trained_again_in_place(routed, tiny_config, tmp_path):

    folder = shutil.copytree(routed, tmp_path / "model")
    train_router(folder, tiny_config, lambda text: None, replace(QUICK, seed=1, hidden_size=4), 24)
    assert (folder / "README.md").read_text().count("## The count by itself") == 1
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.router.hidden.weight.shape[0] == 4 * QUICK.num_members == model.config.router["hidden_size"]


def test_a_run_that_goes_on_from_it_drops_the_router(routed, tiny_config, processor):
    section = tiny_config.model.model_copy(update={"init_from": str(routed)})
    model = build_model(section, tiny_config.budget, processor, torch.float32)
    assert model.router is None and model.config.router is None
    assert not any(name.startswith("router") for name in model.state_dict())


@pytest.mark.parametrize("options, message", [
    ({"num_visual_tokens": "auto", "effort": 1.5}, "effort is 1.5; it must be a number from 0"),
    ({"num_visual_tokens": "auto", "effort": float("nan")}, "effort is nan"),
    ({"num_visual_tokens": "auto", "effort": True}, "effort is True"),
    ({"num_visual_tokens": 4, "effort": 0.5}, "effort=0.5: that is for the router; give num_visual_tokens='auto' with it"),
    ({"num_visual_tokens": ["auto", 4]}, "has 2 entries for 1 images"),
])  # fmt: skip
def test_a_wrong_effort_or_list_is_refused_in_one_line(options, message, choosy, processor, samples):
    with pytest.raises(ValueError, match=message) as caught:
        choosy.generate(**prompts(processor, samples[:1]), **options)
    assert "\n" not in str(caught.value)


def test_auto_where_it_cannot_be_is_refused_in_one_line(bare, choosy, processor, samples):
    inputs = prompts(processor, samples[:1])
    with pytest.raises(ValueError, match="this model has none; train one"):
        AutoModelForImageTextToText.from_pretrained(bare).generate(**inputs, num_visual_tokens="auto")
    trained = choosy.config.trained_num_visual_tokens
    choosy.config.trained_num_visual_tokens = [4, 9]
    try:
        with pytest.raises(
            ValueError, match=r"chooses among \[4, 12\] visual tokens but the model was trained at \[4, 9\]"
        ):
            choosy.generate(**inputs, num_visual_tokens="auto")
    finally:
        choosy.config.trained_num_visual_tokens = trained
    with pytest.raises(ValueError, match="'auto' is for generate"):
        choosy(**inputs, num_visual_tokens="auto")
    with pytest.raises(ValueError, match="'auto' is the model's to choose: leave it out here"):
        prompts(processor, samples[:1], num_visual_tokens="auto")
    with pytest.raises(ValueError, match="has no prices"):
        choosy.new_router().choose(torch.zeros(1, choosy.router.center.numel()), 0.5)


def test_a_generator_asks_the_router(routed, bare, tmp_path):
    Image.effect_noise((64, 48), 60).save(tmp_path / "a.png")
    generator = Generator(routed)
    assert parse_num_visual_tokens("auto") == "auto" and parse_num_visual_tokens("64,Auto") == [64, "auto"]
    with Calls(generator.model) as calls:
        answers = [generator("a?", [tmp_path / "a.png"], "auto", 3, effort) for effort in (0.0, 1.0)]
    assert answers == [generator("a?", [tmp_path / "a.png"], count, 3) for count in COUNTS] and calls == [1]
    with pytest.raises(UserError, match="--effort 0.5 is for --num-visual-tokens auto"):
        generator("a?", [tmp_path / "a.png"], 4, 3, 0.5)
    with pytest.raises(UserError, match="has no router; train one"):
        check_auto(bare)


def test_training_and_evaluation_refuse_what_they_cannot_use(bare, routed, tiny_config, processor, tmp_path):
    say = lambda text: None  # noqa: E731
    with pytest.raises(UserError, match="no exported model there"):
        train_router(tmp_path, tiny_config, say, QUICK)
    with pytest.raises(UserError, match="has no router; train one first"):
        evaluate_router(bare, tiny_config, say, tmp_path)
    one = BudgetConfig(num_visual_tokens=(12,), probabilities=(1.0,))
    model = build_model(tiny_config.model, one, processor, torch.float32)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    export_model(model, state, processor, tmp_path / "one")
    with pytest.raises(UserError, match=r"trained at \[12\] visual tokens alone"):
        train_router(tmp_path / "one", tiny_config, say, QUICK)


def asked_by_hand():
    """Two counts, four questions: right at both, at the larger, at none, at the smaller; the third has two images."""
    return Asked(
        keys=list("abcd"),
        tasks=["t"] * 4,
        counts=(10, 40),
        efforts=(0.5,),
        tiles=np.array([1, 1, 2, 1]),
        right=np.array([[1, 1], [0, 1], [0, 0], [1, 0]], dtype=bool),
        confidence=np.array([[0.9, 0.9], [0.4, 0.8], [0.2, 0.3], [0.95, 0.6]]),
        routed=np.array([[1], [1], [0], [1]], dtype=bool),
        spent=np.array([[10], [40], [20], [10]]),
        shares=np.array([[0.75, 0.25]]),
    )


def test_policies_come_to_what_can_be_counted_by_hand():
    rows = {(row["policy"], row["setting"]): row for row in rows_of(asked_by_hand())}
    assert (
        rows["always", 40]["accuracy"] == 0.5
        and rows["always", 40]["tokens"] == 50
        and rows["always", 40]["kept_low"] == 1
    )
    router, chance, oracle = rows["router", 0.5], rows["random", 0.5], rows["oracle", None]
    assert (router["accuracy"], router["tokens"], router["token_share"], router["kept"]) == (0.75, 20, 0.4, 1.5)
    assert (chance["accuracy"], chance["tokens"]) == (0.5, 0.75 * 12.5 + 0.25 * 50)
    assert (oracle["accuracy"], oracle["tokens"]) == (0.75, 20)
    assert router["kept_low"] <= router["kept"] <= router["kept_high"]
    up = cascade(asked_by_hand(), 0.5)  # b and c go up, and have paid for both tries
    assert up.right.tolist() == [1, 1, 0, 1] and up.tokens.tolist() == [10, 50, 100, 10]
    lines = [{"policy": "x", "token_share": share, "accuracy": share / 2} for share in (0.2, 0.6)]
    assert accuracy_at(lines, "x", 0.4) == pytest.approx(0.2) and accuracy_at(lines, "x", 0.9) == 0.3


def test_questions_asked_at_once_are_answered_as_one_by_one(choosy, processor, samples, tiny_config):
    some = samples[:8]
    choosy.config.router["effort"] = 0.5
    with Calls(choosy) as calls:
        asked = ask(choosy, processor, some, tiny_config.evaluate.model_copy(update={"batch_size": 5}))
    assert sum(calls) == sum(len(sample.images) for sample in some) and asked.efforts == EFFORTS
    for place, count in enumerate(COUNTS):
        assert asked.right[:, place].tolist() == hits(choosy, processor, some, count, tiny_config.evaluate)
    middle = EFFORTS.index(0.5)
    chosen = choosy.choose_num_visual_tokens(**prompts(processor, some), effort=0.5)
    assert asked.routed[:, middle].tolist() == hits(choosy, processor, some, chosen, tiny_config.evaluate)
    assert asked.spent[:, middle].sum() == sum(chosen) and (asked.tiles == [len(s.images) for s in some]).all()
    assert ((asked.confidence > 0) & (asked.confidence <= 1)).all()
    np.testing.assert_allclose(asked.shares.sum(1), 1)


def test_teacher_forcing_asks_the_last_answer_at_the_chosen_counts(
    choosy, processor, samples, tiny_config, monkeypatch
):
    """A model that has learned nothing is never right, so what its answers come to is drawn; everything else is real."""
    said = lambda role, text: {"role": role, "content": [{"type": "text", "text": text}]}
    question, answer = samples[0].messages[0], samples[0].messages[-1]
    longer = [question, said("assistant", "blue"), said("user", "and now?"), answer]
    some = [*samples[:6], replace(samples[0], messages=longer)]
    bits = []

    def drawn(*arguments):
        found = measure(*arguments)
        draws = torch.rand(len(found.right), 2, generator=torch.Generator().manual_seed(1)) < 0.5
        for row in range(1, len(draws)):  # the images of an answer share what it came to
            if found.samples[row] == found.samples[row - 1] and (found.losses[row] == found.losses[row - 1]).all():
                draws[row] = draws[row - 1]
        bits.append((found, draws))
        return replace(found, right=draws)

    monkeypatch.setattr("tokenflex.router.evaluate.measure", drawn)
    asked = ask_teacher_forced(choosy, processor, some, tiny_config.evaluate)
    ((found, draws),) = bits
    last = [int((found.samples == number).nonzero()[-1]) for number in range(len(some))]
    assert (asked.right == draws[last].numpy()).all() and asked.right.any() and not asked.right.all()
    images = iter(choosy.choose_num_visual_tokens(**prompts(processor, some), effort=0.5))
    middle = asked.efforts.index(0.5)
    for row, sample in enumerate(some):
        counts = [next(images) for _ in sample.images]
        assert asked.spent[row, middle] == sum(counts) and asked.tiles[row] == len(counts)
        assert asked.routed[row, middle] == all(asked.right[row, COUNTS.index(count)] for count in counts)
    assert {row["policy"] for row in rows_of(asked)} == {"always", "router", "random", "oracle"}


def test_an_evaluation_has_the_routers_answers_and_tokens(choosy, processor, samples, tiny_config):
    """Those of asking at its numbers; a question without an image is as ever; several ranks join to the same."""
    text = replace(samples[0], key="text", images=[], messages=[
        {"role": "user", "content": [{"type": "text", "text": "one and one?"}]}, samples[0].messages[-1]
    ])  # fmt: skip
    some, settings = [*samples[:5], text], tiny_config.evaluate.model_copy(update={"batch_size": 2})
    choosy.config.router["effort"] = 0.5
    answers = evaluate_model(choosy, processor, some, settings, with_auto=True)
    chosen = iter(choosy.choose_num_visual_tokens(**prompts(processor, some[:5]), effort=0.5))
    for number, sample in enumerate(some):
        counts = [next(chosen) for _ in sample.images]
        assert (answers.auto.tokens[number], answers.auto.images[number]) == (sum(counts), len(counts))
        if len(set(counts)) == 1 and counts[0] in answers.right:
            assert answers.auto.right[number] == answers.right[counts[0]][number]
    assert answers.auto.right[-1] == answers.right[settings.num_visual_tokens[0]][-1]
    halves = [evaluate_model(choosy, processor, part, settings, with_auto=True) for part in (some[1::2], some[::2])]
    joined = Answers.join(halves)
    order = sorted(range(len(some)), key=lambda place: some[place].key)
    assert joined.auto.tokens == [answers.auto.tokens[place] for place in order]
    totals = answers.routed(answers.auto, 0.5)
    assert sum(totals["visual_tokens"].values()) == sum(answers.auto.tokens) and totals["images"][text.task] >= 0


def test_a_run_gives_its_model_a_router_once(bare, tiny_config, tmp_path):
    """Also where it is called again; a model of one count goes without, and says so."""
    config = tiny_config.model_copy(update={
        "output_dir": str(tmp_path), "evaluate": tiny_config.evaluate.model_copy(update={"router_samples": 12})
    })  # fmt: skip
    folder = RunLayout.of(config).model
    shutil.copytree(bare, folder)
    give_router(config, lambda text: None)
    first = (folder / "model.safetensors").read_bytes()
    assert json.loads((folder / "config.json").read_text())["router"]["num_visual_tokens"] == COUNTS
    give_router(config, lambda text: pytest.fail(text))
    assert (folder / "model.safetensors").read_bytes() == first
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "router": None, "trained_num_visual_tokens": [12]}))
    said = []
    give_router(config, said.append)
    assert said == ["router    none: the model was trained at [12] visual tokens alone"]


def test_the_command_trains_and_compares(bare, cache_dir, tmp_path, capsys):
    from conftest import TINY

    from tokenflex.cli.main import main

    arguments = ["train-router", str(bare), "--config", str(TINY), "--set", f"data.cache_dir={cache_dir}"]
    out = tmp_path / "out"
    assert main([*arguments, "--samples", "12", "--output", str(tmp_path / "model"), "--evaluate", str(out)]) == 0
    record = json.loads((out / "router.json").read_text())
    assert {row["policy"] for row in record["rows"]} == {"always", "router", "random", "cascade", "oracle"}
    assert "| always 12 |" in (out / "router.md").read_text() in capsys.readouterr().out + "\n"
    with Image.open(out / "router.png") as image:
        assert image.size == (960, 540)
    forced = [*arguments, "--set", "evaluate.max_samples_per_task=2", "--only-evaluate", "--teacher-forced"]
    forced[1] = str(tmp_path / "model")
    assert main([*forced, "--evaluate", str(tmp_path / "forced")]) == 0
    policies = {row["policy"] for row in json.loads((tmp_path / "forced" / "router.json").read_text())["rows"]}
    assert policies == {"always", "router", "random", "oracle"}
    assert main([*arguments, "--teacher-forced"]) == 2
    assert "--evaluate DIR" in capsys.readouterr().err
    assert main([*arguments, "--only-evaluate"]) == 2
    assert "--evaluate DIR" in capsys.readouterr().err
