"""Caches kept over turns: the same answers as without, and nothing that was there before is run again."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from tokenflex.export import export_model
from tokenflex.infer import Generator
from tokenflex.infer.conversations import Conversations
from tokenflex.model import TokenFlexConfig, TokenFlexForConditionalGeneration, build_model, build_processor

ROOM = 2**30


def image(number, size=(64, 48)):
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def user(text, *images):
    return {"role": "user", "content": [*({"type": "image", "image": data} for data in images), {"type": "text", "text": text}]}  # fmt: skip


def assistant(text):
    return {"role": "assistant", "content": text}


def counted(model):
    """The numbers of tokens that the language model is called with from now on."""
    calls = []
    model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    return calls


class Chat:
    """A generator with caches beside one without: every answer of the first is held to the second's, token by token."""

    def __init__(self, folder, room=ROOM, num_new=6):
        self.with_caches, self.without = Generator(folder, cache_bytes=room), Generator(folder)
        self.calls, self.num_new = counted(self.with_caches.model), num_new

    def ask(self, messages, counts=None):
        """(tokens of the prompt, those of them that were run, the answer's text)."""
        options = {"max_new_tokens": self.num_new, "do_sample": False, "eos_token_id": None}
        wanted, none = self.without.generate(self.without.inputs(messages, counts), **options)
        inputs = self.with_caches.inputs(messages, counts)
        self.calls.clear()
        answer, num_cached = self.with_caches.generate(inputs, **options)
        assert torch.equal(answer, wanted) and none == 0
        prompt, steps = self.calls[0], self.calls[1:]
        assert steps == [1] * (self.num_new - 1)
        assert prompt + num_cached == inputs["input_ids"].shape[1]
        self.ids = [*inputs["input_ids"][0].tolist(), *answer.tolist()[:-1]]  # the last one was never run
        return inputs["input_ids"].shape[1], prompt, self.with_caches.processor.decode(answer)


def shared(ids, others):
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, others)))


@pytest.fixture
def chat(tiny_export):
    return Chat(tiny_export)


def test_a_further_turn_runs_what_is_new_alone(chat):
    """Whatever comes in it: text, an image, an image at another count."""
    talk, before, first = [], [], 0
    for turn, (text, images, counts) in enumerate(
        [
            ("what?", [image(0)], [12]),
            ("and there?", [], [12]),
            ("this one?", [image(1), image(2)], [12, 4, 6]),
            ("the first again?", [image(0)], [12, 4, 6, 4]),
        ]
    ):
        talk.append(user(text, *images))
        length, run, answer = chat.ask(talk, counts)
        assert run == length - shared(chat.ids, before) and shared(chat.ids, before) >= first
        assert turn == 0 or run < length - first + 8  # the whole earlier prompt was there
        talk.append(assistant(answer))
        before, first = chat.ids, length
    assert len(chat.with_caches._conversations._kept) == 1, "of one conversation its last turn is kept"


def test_another_question_about_an_image_runs_the_question_alone(chat):
    length, run, _ = chat.ask([user("what?", image(0))])
    assert run == length
    length, run, _ = chat.ask([user("where?", image(0))])
    assert run < length - 12, "the 12 tokens of the image were there"
    assert chat.ask([user("where?", image(0))])[1] == 1, "of a prompt that was there whole the last token is run"


CHANGED = {
    "the image": ((image(9), image(1)), [12, 4]),
    "the second image": ((image(0), image(9)), [12, 4]),
    "the images' order": ((image(1), image(0)), [12, 4]),
    "the count": ((image(0), image(1)), [4, 4]),
    "the second count": ((image(0), image(1)), [12, 12]),
    "the rectangle": ((image(0), image(1)), [(2, 6), 4]),
}


@pytest.mark.parametrize("change", CHANGED)
def test_an_image_that_was_another_ends_what_is_shared(change, chat):
    """Also where both prompts are the same tokens."""
    images, counts = CHANGED[change]
    question = lambda some: [{"role": "user", "content": [
        {"type": "text", "text": "First:"}, {"type": "image", "image": some[0]},
        {"type": "text", "text": "Second:"}, {"type": "image", "image": some[1]}, {"type": "text", "text": "?"}]}]  # fmt: skip
    chat.ask(question((image(0), image(1))), [12, 4])
    length, run, _ = chat.ask(question(images), counts)
    token = chat.with_caches.processor.image_token_id
    first = chat.ids.index(token)
    second = chat.ids.index(token, first + 12)
    assert length - run == (second if change.startswith("the second") else first)


def test_a_turn_that_was_changed_ends_what_is_shared(chat):
    talk = [user("what?", image(0)), assistant("a lamp"), user("and now?")]
    chat.ask(talk)
    before = chat.ids
    length, run, _ = chat.ask([talk[0], assistant("a lantern"), *talk[2:]])
    assert run == length - shared(chat.ids, before) and length - run > 12
    length, run, _ = chat.ask([user("who?", image(0)), *talk[1:]])
    assert length - run < shared(chat.ids, before) + 1 and run > 5


def test_a_template_that_writes_earlier_turns_anew_shares_what_stands_before(chat):
    for generator in (chat.with_caches, chat.without):
        template = str(generator.processor.chat_template)
        loop, end = template.rsplit("{%- endfor -%}", 1)
        length = "{%- if loop.first -%}{{ messages | length ~ ' messages' }}{%- endif -%}"
        generator.processor.chat_template = loop + length + "{%- endfor -%}" + end
    talk = [user("what?", image(0))]
    first, _, answer = chat.ask(talk)
    before = chat.ids
    length, run, _ = chat.ask([*talk, assistant(answer), user("and now?")])
    assert 12 < length - run == shared(chat.ids, before) < first - 5


def test_tiles_of_an_image_are_shared_whole_or_not_at_all(tiny_config, tmp_path):
    config = tiny_config.model.model_copy(update={"max_tiles": 4})
    budget = tiny_config.budget.model_copy(update={"sides": "aspect"})
    processor = build_processor(config, budget)
    model = build_model(config, budget, processor, torch.float32)
    export_model(model, dict(model.state_dict()), processor, tmp_path / "model")
    chat = Chat(tmp_path / "model")
    talk = [user("what?", image(0, (128, 48)))]
    chat.ask(talk, 4)
    length, run, _ = chat.ask([*talk, assistant("a lamp"), user("and this?", image(1, (48, 128)))], 4)
    assert length - run > 3 * 4, "two tiles and a thumbnail"
    red = [io.BytesIO(), io.BytesIO()]
    for data, size in zip(red, ((64, 30), (30, 64))):
        Image.new("RGB", size, "red").save(data, "PNG")
    chat.ask([user("what?", red[0].getvalue())], 4)
    length, run, _ = chat.ask([user("what?", red[1].getvalue())], 4)
    assert length - run == chat.ids.index(processor.image_token_id), "the same pixels, of another shape"


def test_a_prompt_that_ends_with_its_image_runs_the_image_again(tiny_export):
    """The last token has to be run, and an image is never cut."""
    model = Generator(tiny_export).model
    token, store = model.config.image_token_id, Conversations(model, ROOM)
    inputs = {"input_ids": torch.tensor([[7, 8, *[token] * 4]]), "pixel_values": torch.zeros(1, 3, 48, 64), "num_tiles": torch.tensor([1])}  # fmt: skip
    cache = store.resume(inputs)
    model(**inputs, cache=cache)
    store.keep(inputs, inputs["input_ids"][0], cache)
    assert store.resume(inputs).get_seq_length() == 2


def test_conversations_in_turn_are_kept_beside_each_other(chat):
    talks = [[user(f"what is {number}?", image(number))] for number in range(3)]
    for talk in talks:
        chat.ask(talk)
    for talk in talks:
        length, run, _ = chat.ask([*talk, assistant("a lamp"), user("and now?")])
        assert run < 40 < length


def test_what_is_kept_has_room_or_goes(tiny_export):
    """The oldest first; one that is larger than the room by itself costs the others nothing."""
    probe = Chat(tiny_export)
    probe.ask([user("what is it then, and what is it for?")])
    (kept,) = probe.with_caches._conversations._kept
    assert kept.num_bytes == 2 * 2 * 2 * 8 * 4 * len(kept.ids), "layers, keys and values, heads, width, bytes of fp32"
    room = 7 * kept.num_bytes // 2  # for three
    chat = Chat(tiny_export, room)
    store = chat.with_caches._conversations
    talks = [[user(f"{letter}hat is it then, and what is it for?")] for letter in "abcd"]
    lengths = [chat.ask(talk)[0] for talk in talks]
    assert len(store._kept) == 3 and sum(kept.num_bytes for kept in store._kept) <= room
    chat.ask([user("what is all of this, and what is it for? " * 8)])
    assert [chat.ask(talk)[1] for talk in talks[1:]] == [1, 1, 1]
    assert chat.ask(talks[0])[1] > 1 and lengths[0] > 1, "it was the oldest"
    none = Chat(tiny_export, room=0)
    assert [none.ask(talks[0])[1] for _ in range(2)] == [none.ask(talks[0])[0]] * 2


def test_memory_that_ran_out_is_given_back(chat, monkeypatch):
    talk = [user("what?", image(0))]
    chat.ask(talk)

    def full(**inputs):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as broken, pytest.raises(torch.OutOfMemoryError):
        broken.setattr(chat.with_caches.model, "generate", full)
        chat.ask(talk)
    length, run, _ = chat.ask(talk)
    assert run == length, "nothing was kept any more"


@pytest.mark.parametrize(
    "text, is_kept",
    [
        ({}, True),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8, "use_sliding_window": True}, False),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, False),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, False),
    ],
)  # fmt: skip
def test_a_cache_that_cannot_go_back_is_not_kept(text, is_kept, tiny_config):
    parts = dict(tiny_config.model.vision), {**tiny_config.model.text, "vocab_size": 50, **text}
    config = TokenFlexConfig(*parts, image_height=48, image_width=64)
    model = TokenFlexForConditionalGeneration(config)
    cache = Conversations(model, ROOM).resume({"input_ids": torch.tensor([[7, 8, 9]])})
    assert isinstance(cache, DynamicCache) if is_kept else cache is None
