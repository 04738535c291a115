"""Laws of rendering, for every chat template and conversation: what is learned is what was said, and what inference asks for.

(1) Every text lands in its own turn, once and in order, or the conversation is refused. (2) The tokens before the first
learned token of an answer are the generation prompt that inference builds from the messages before it. (3) What ends a turn
is learned. (4) What the template does to a text is what training sees.
"""

import contextlib
import json
import re
import sys
from pathlib import Path

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenflex.corpus.tokenizer import build_tokenizer
from tokenflex.errors import UserError
from tokenflex.model import TokenFlexImageProcessor, TokenFlexProcessor, check_template
from tokenflex.model.processing_tokenflex import RenderingRefused

sys.path.insert(0, str(Path(__file__).parent))
from chat_templates import CHATML, GOOD, WRONG, templates

TOKENIZER = build_tokenizer()
IMAGE = {"type": "image"}
TAG = "<img><IMG_CONTEXT></img>"
SIGN = "\uf700" * len(TAG)


def processor_of(template, **options):
    return TokenFlexProcessor(
        TokenFlexImageProcessor(8, 8),
        TOKENIZER,
        chat_template=template,
        patch_grid=(2, 2),
        num_visual_tokens=4,
        **options,
    )


def with_items(messages):
    """Messages whose content is a list, with signs in place of the tag of an image, which no template changes."""
    tag = SIGN + "\n"
    said = lambda content: [{"type": "text", "text": content}] if isinstance(content, str) else content  # noqa: E731
    return [
        {
            **m,
            "content": [
                {"type": "text", "text": "".join(tag if i == IMAGE else i["text"] for i in said(m["content"]))}
            ],
        }
        for m in messages
    ]


def as_strings(messages):
    return [{**m, "content": m["content"][0]["text"]} for m in with_items(messages)]


def written(template, messages, tokenizer=TOKENIZER, **options):
    """What transformers itself makes of a conversation, in the forms that a template may take."""
    texts = []
    for form in (as_strings(messages), with_items(messages)):
        try:
            text = tokenizer.apply_chat_template(form, chat_template=template, tokenize=False, **options)
            texts.append(text.replace(SIGN, TAG))
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError):
            texts.append(None)
    return texts


def spans(encoded):
    flags = [False, *encoded.is_target, False]
    edges = [at for at in range(len(flags) - 1) if flags[at] != flags[at + 1]]
    return list(zip(edges[::2], edges[1::2]))


def num_images(messages):
    return sum(item == IMAGE for m in messages if not isinstance(m["content"], str) for item in m["content"])


def hold_laws(processor, messages, **options):
    """Encode a conversation and hold it to the laws; returns which answers are learned. `word N` is in message N alone."""
    template, tokenizer = processor.chat_template, processor.tokenizer
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    encode = lambda some, **more: processor.encode(some, [1] * num_images(some), **more, **options)  # noqa: E731
    encoded = encode(messages)
    ids, text = encoded.input_ids, tokenizer.decode(encoded.input_ids)
    variables = {**processor.chat_template_options, **options}
    said = [t for t in written(template, messages, tokenizer, **variables) if t is not None]
    end = processor.turn_end_id()
    closings = ["", tokenizer.decode([end]) if end is not None else ""]
    assert any(text == t + closing for t in said for closing in closings), (text, said)  # (1), (4)
    bare = encode(
        [{**m, "content": f"word{at}"} if isinstance(m["content"], str) else m for at, m in enumerate(messages)]
    )
    for at, message in enumerate(messages):  # a template may cut a text, but short ones come once
        times = len(re.findall(rf"word{at}\b", tokenizer.decode(bare.input_ids).casefold()))
        assert times == 1 or (times == 0 and not isinstance(message["content"], str)), (at, text)
    order = [int(number) for number in re.findall(r"word(\d+)", text.casefold())]
    assert order == sorted(set(order))
    count = lambda e: sorted(i for i in e.input_ids if i in special)  # noqa: E731
    assert count(encoded) == count(bare)  # no text has become a token of its own
    learned = []
    for begin, stop in spans(encoded):
        inside = [int(number) for number in re.findall(r"word(\d+)", tokenizer.decode(ids[begin:stop]).casefold())]
        if not inside:  # the template has cut the word
            continue
        assert len(inside) == 1 and messages[inside[0]]["role"] == "assistant"
        prompt = encode(messages[: inside[0]], add_generation_prompt=True)
        assert ids[:begin] == prompt.input_ids  # (2)
        asked = [
            t
            for t in written(template, messages[: inside[0]], tokenizer, add_generation_prompt=True, **variables)
            if t is not None
        ]
        assert tokenizer.decode(ids[:begin]) in asked
        rest = tokenizer.decode(ids[stop - 1 :])
        assert ids[stop - 1] in special or end is None, rest  # (3)
        learned += inside
    return learned


CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "word0?"}, {"role": "assistant", "content": "word1."}],
    "with an image": [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": " word0 "}]},
        {"role": "assistant", "content": " word1\n"},
    ],
    "several turns": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "word0\n"}, IMAGE, {"type": "text", "text": "or"}, IMAGE],
        },
        {"role": "assistant", "content": "word1"},
        {"role": "user", "content": "word2"},
        {"role": "assistant", "content": "\n word3 \n"},
    ],
    "a system message": [
        {"role": "system", "content": "word0"},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "word1"}]},
        {"role": "assistant", "content": "word2"},
        {"role": "user", "content": "word3"},
        {"role": "assistant", "content": "word4"},
    ],
    "special tokens spelled": [
        {"role": "user", "content": "word0<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"},
        {"role": "assistant", "content": "<|endoftext|>word1<IMG_CONTEXT><|im_end|>"},
    ],
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_templates_of_public_models(name, case):
    processor, messages = processor_of(GOOD[name]), CONVERSATIONS[case]
    learned = hold_laws(processor, messages)
    assert learned == [at for at, message in enumerate(messages) if message["role"] == "assistant"]


@pytest.mark.parametrize("name", GOOD)
def test_the_check_at_the_start_passes_them(name):
    assert check_template(processor_of(GOOD[name])) == []


@pytest.mark.parametrize("name", WRONG)
def test_a_template_that_breaks_a_law_is_refused_at_the_start_or_by_the_conversation(name):
    processor = processor_of(WRONG[name])
    with pytest.raises((RenderingRefused, UserError)):
        processor.encode(CONVERSATIONS["a system message"], [1])
        check_template(processor)
    if name != "leaves out system messages":
        with pytest.raises(UserError, match="model.tokenizer .*chat template .*; name another tokenizer") as error:
            check_template(processor)
        assert "\n" not in str(error.value)
    else:
        (note,) = check_template(processor)
        assert note.endswith("refused (the chat template leaves out the text of message 0 (system))")
        hold_laws(processor, CONVERSATIONS["several turns"])


SNIPPETS = [" ", "\n", "e", "é", "x", "<|im_end|>", "</think>", "<think>", "[INST]", "{{ x }}", "\ue0000\ue001"]
WORDS = st.lists(st.sampled_from(SNIPPETS), max_size=5).map("".join)


@st.composite
def conversations(draw):
    """Conversations of one to three turns, each text with its own word, perhaps with a system message and images."""
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * draw(st.integers(1, 3))
    messages = []
    for at, role in enumerate(roles):
        text = draw(WORDS) + f"word{at} " + draw(WORDS)
        content = [{"type": "text", "text": text}]
        if role == "user" and draw(st.booleans()):
            content.insert(draw(st.integers(0, 1)), IMAGE)
        messages.append({"role": role, "content": content if draw(st.booleans()) or len(content) > 1 else text})
    return messages


@given(templates(), conversations())
@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_generated_templates_hold_the_laws_or_are_refused(template, messages):
    with contextlib.suppress(RenderingRefused, jinja2.TemplateError):
        hold_laws(processor_of(template), messages)


def is_renderable(template, messages):
    """By transformers alone: every word comes once and in order, and some answer follows its generation prompt."""
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = {at: written(template, messages[:at], add_generation_prompt=True) for at in answers}
    for form, text in enumerate(written(template, messages)):
        order = [int(number) for number in re.findall(r"word(\d+)", (text or "").casefold())]
        if order == list(range(len(messages))) and any(
            prompts[at][form] is not None
            and text.startswith(prompts[at][form])
            and not re.findall(r"word", text[len(prompts[at][form]) : text.casefold().index(f"word{at}")])
            for at in answers
        ):
            return True
    return False


@given(templates(), st.integers(1, 3), st.booleans())
@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_nothing_is_refused_that_could_be_rendered(template, num_turns, with_system):
    roles = ["system"] * with_system + ["user", "assistant"] * num_turns
    messages = [{"role": role, "content": f"word{at} "} for at, role in enumerate(roles)]
    try:
        hold_laws(processor_of(template), messages)
        is_rendered = True
    except (RenderingRefused, jinja2.TemplateError):
        is_rendered = False
    assert is_rendered == is_renderable(template, messages)


@given(templates())
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_what_the_check_passes_holds_the_laws(template):
    """A run that starts learns every last answer of plain conversations, right; none of them is refused."""
    processor = processor_of(template)
    try:
        notes = check_template(processor)
    except UserError:
        return
    for case in ("one turn", "with an image", "several turns"):
        learned = hold_laws(processor, CONVERSATIONS[case])
        assert learned[-1] == len(CONVERSATIONS[case]) - 1
    if not notes:
        assert hold_laws(processor, CONVERSATIONS["a system message"]) == [2, 4]


def test_the_think_block_is_learned_where_the_model_has_to_write_it():
    """Qwen3's structure: without an option the model writes the empty block, with it the prompt has it."""
    messages = CONVERSATIONS["several turns"]
    learned = lambda e: [TOKENIZER.decode(e.input_ids[a:b]) for a, b in spans(e)]  # noqa: E731
    on = processor_of(GOOD["thinking on the last turn"])
    assert learned(on.encode(messages[:2], [1, 1])) == ["<think>\n\n</think>\n\nword1<|im_end|>"]
    assert learned(on.encode(messages, [1, 1])) == ["word1<|im_end|>", "<think>\n\n</think>\n\n word3 \n<|im_end|>"]
    off = processor_of(GOOD["thinking on the last turn"], chat_template_options={"enable_thinking": False})
    assert learned(off.encode(messages[:2], [1, 1])) == ["word1<|im_end|>"]
    assert hold_laws(off, messages) == [3]  # the first answer has no block, its prompt would have one
    assert any("only the last is learned" in note for note in check_template(off))
    thought = [messages[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nword1"}]
    assert learned(on.encode(thought, [1, 1])) == ["<think>\nhm\n</think>\n\nword1<|im_end|>"]
    with pytest.raises(RenderingRefused, match="behind its generation prompt"):
        off.encode(thought, [1, 1])


def test_options_of_the_template_are_saved_with_the_processor_and_unknown_ones_refused(tmp_path):
    processor = processor_of(GOOD["thinking on the last turn"], chat_template_options={"enable_thinking": False})
    processor.save_pretrained(tmp_path)
    again = TokenFlexProcessor.from_pretrained(tmp_path)
    prompt = lambda p, **more: p.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, **more
    )  # noqa: E731
    assert again.chat_template_options == {"enable_thinking": False} and prompt(again).endswith("</think>\n\n")
    assert prompt(again) == prompt(processor) and not prompt(again, enable_thinking=True).endswith("</think>\n\n")
    with pytest.raises(UserError, match="does not know 'enable_thought'"):
        check_template(processor_of(CHATML, chat_template_options={"enable_thought": True}))


def test_a_turn_of_no_weight_is_context():
    messages = [dict(m) for m in CONVERSATIONS["several turns"]]
    messages[1]["weight"] = 0
    assert hold_laws(processor_of(CHATML), messages) == [3]
    assert (
        processor_of(CHATML).encode(messages, [1, 1]).input_ids
        == processor_of(CHATML).encode(CONVERSATIONS["several turns"], [1, 1]).input_ids
    )


TOOLS = CHATML.replace(
    "+ m.content +", "+ (m.content or '') + (('<tool_call>' + (m.tool_calls | tojson)) if m.tool_calls else '') +"
)


@pytest.mark.parametrize("absent", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_tool_calls_without_content(absent):
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "é"}}}]
    messages = [
        {"role": "user", "content": "word0"},
        {"role": "assistant", **absent, "tool_calls": calls},
        {"role": "tool", "content": "word2"},
    ]
    encoded = processor_of(TOOLS).encode(messages, [])
    (span,) = spans(encoded)
    assert (
        TOKENIZER.decode(encoded.input_ids[slice(*span)])
        == f"<tool_call>{json.dumps(calls, ensure_ascii=False)}<|im_end|>"
    )
    with pytest.raises(RenderingRefused, match="leaves out the tool calls"):
        processor_of(CHATML).encode(messages, [])
    calls[0]["function"]["name"] = "<|im_end|>"
    with pytest.raises(ValueError, match="message 1 spells the special token '<|im_end|>'".replace("|", r"\|")):
        processor_of(TOOLS).encode(messages, [])


def test_the_date_of_a_run_is_what_the_template_sees():
    processor = processor_of(GOOD["a date in it"])
    processor.render_date = "2024-07-26"
    text = processor.apply_chat_template([{"role": "user", "content": "x"}])
    assert text.startswith("<|im_start|>Today is 26 Jul 2024<|im_end|>")
    assert TOKENIZER.decode(processor.encode(CONVERSATIONS["one turn"], []).input_ids).startswith(
        "<|im_start|>Today is 26 Jul 2024"
    )
    processor.render_date = ""
    assert "2024" not in processor.apply_chat_template([{"role": "user", "content": "x"}])


def test_named_templates(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "short": GOOD["blanks around an answer"]}
    processor = TokenFlexProcessor(TokenFlexImageProcessor(8, 8), tokenizer, patch_grid=(2, 2))
    ask = [{"role": "user", "content": "x"}]
    assert processor.apply_chat_template(ask).startswith("<|im_start|>user")
    assert processor.apply_chat_template(ask, chat_template="short") == "<|im_start|>[INST] x [/INST]"
    processor.save_pretrained(tmp_path)
    again = TokenFlexProcessor.from_pretrained(tmp_path)
    assert again.apply_chat_template(ask) == processor.apply_chat_template(ask)
    tokenizer.chat_template = {"a": CHATML, "b": CHATML}
    with pytest.raises(ValueError, match=r"chat templates \['a', 'b'\] and none named 'default'"):
        TokenFlexProcessor(TokenFlexImageProcessor(8, 8), tokenizer, patch_grid=(2, 2))


def test_an_image_token_that_is_not_special_is_not_spelled_by_texts():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<image>"])
    processor = TokenFlexProcessor(
        TokenFlexImageProcessor(8, 8), tokenizer, chat_template=CHATML, patch_grid=(2, 2), image_token="<image>"
    )
    encoded = processor.encode([{"role": "user", "content": [IMAGE, {"type": "text", "text": "a <image> of"}]}], [3])
    assert encoded.input_ids.count(processor.image_token_id) == 3
    assert "a <image> of" in tokenizer.decode(encoded.input_ids)


@pytest.mark.parametrize("lost", [" ", "\n", "[ \n]", "[^a-zA-Z]", None])
def test_a_tokenizer_that_joins_words_is_refused_by_name(lost):
    """As one does whose class the installed transformers gets wrong; one that knows no capital letters is none."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = (
        normalizers.Replace(Regex(lost), "") if lost is not None else normalizers.Lowercase()
    )
    processor = TokenFlexProcessor(
        TokenFlexImageProcessor(8, 8), tokenizer, chat_template=CHATML, patch_grid=(2, 2), num_visual_tokens=4
    )
    if lost is None:
        assert check_template(processor) == []
        return
    with pytest.raises(UserError, match=r"words are joined.*another release of transformers.*; name another tokenizer"):
        check_template(processor)


@pytest.mark.parametrize("scheme", ["first", "never"])
@pytest.mark.parametrize("name", ["blanks around an answer", "plain", "trimmed", "prompt without the blank"])
def test_a_sentencepiece_tokenizer_writes_no_blank_of_its_own(scheme, name):
    """Such a tokenizer writes a blank before what it is given; the text of a conversation has the template's blanks only."""
    letters = [
        "\u2581",
        "<unk>",
        *(f"<0x{code:02X}>" for code in range(256)),
        *map(chr, range(33, 127)),
        "\u2581w",
        "\u2581x",
    ]
    vocabulary = {token: index for index, token in enumerate(letters)}
    backend = Tokenizer(
        models.BPE(vocabulary, [("\u2581", "w"), ("\u2581", "x")], byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = TOKENIZER.all_special_tokens
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", additional_special_tokens=special
    )
    processor = TokenFlexProcessor(
        TokenFlexImageProcessor(8, 8), tokenizer, chat_template=GOOD[name], patch_grid=(2, 2)
    )
    for messages in CONVERSATIONS.values():
        encoded = processor.encode(messages, [1] * num_images(messages))
        came = tokenizer.decode(encoded.input_ids).removeprefix(" ")
        assert came in [text for text in written(GOOD[name], messages) if text is not None]
    if name == "blanks around an answer":  # and the answer begins as the model would write it
        ((begin, _),) = spans(processor.encode(CONVERSATIONS["one turn"], []))
        assert (
            tokenizer.convert_ids_to_tokens(processor.encode(CONVERSATIONS["one turn"], []).input_ids)[begin]
            == "\u2581w"
        )
