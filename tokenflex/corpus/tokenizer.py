"""The small tokenizer of the embedded corpus: byte-level BPE, lossless on any text, every digit a token of its own.

Why this file exists: a model that trains in minutes on two CPU cores cannot afford the 150,000 rows of a real
vocabulary, and a digit answer must be one token. The merges are learned from the fixed phrasing of questions.py, so
the tokenizer is the same for every corpus.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .questions import ALL_CELLS, cell_name
from .scenes import INKS

MAX_CELLS = max(ALL_CELLS)
PAD_TOKEN = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
SPECIAL_TOKENS = (PAD_TOKEN, TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT)
MAX_VOCAB = 512

# The name of a cell, or one digit, each with its leading space; or a word with its leading space and the newline behind it
# (so "assistant\n" is one token); or one character of anything else. Every character falls into one of the alternatives.
SPLIT_PATTERN = r" ?[A-Z]\p{N}(?!\p{N})| ?\p{N}| ?[\p{L}\p{M}]+\n?|[^\p{L}\p{M}\p{N}]"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}
{{ '<img><IMG_CONTEXT></img>\\n' }}
{%- elif item['type'] == 'text' -%}
{{ item['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

# What the merges are learned from. Words in upper case are left out on purpose: rendered words are upper case, and one
# never seen in training must be spelled with letters that were. Names of cells ("B3", " B3") are tokens of their own: as
# two tokens they are bound to a place only after a plateau of hundreds of steps.
PHRASES = (
    "system\n", "user\n", "assistant\n", "which color", *(f" {ink}" for ink in INKS), "digit in image", "larger image", "read row", "read word",
    "read digits", "digit at", "count digits", "count", "larger of", "difference of", *(f" {digit}" for digit in range(10)),
    *(space + cell_name(row, column) for space in ("", " ") for row in range(MAX_CELLS) for column in range(MAX_CELLS)),
)  # fmt: skip


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tokenizer, with its ChatML chat template; pad is `<|endoftext|>`, end of turn `<|im_end|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PHRASES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START, IMAGE_START, IMAGE_END, IMAGE_CONTEXT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
