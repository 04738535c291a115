"""The check of a chat template at a run's start: what is learned is what was said, and what is asked for at inference.

Two short conversations go through the run's own processor, one without and one with a system message, both with images,
several turns, and texts with blanks around them.
"""

import re

import jinja2

from ..errors import UserError
from .processing_tokenflex import TokenFlexProcessor, default_template
from .rendering import knows_variable

IMAGE = {"type": "image"}
TURNS = [
    {"role": "user", "content": [IMAGE, {"type": "text", "text": " What is the first?\n"}]},
    {"role": "assistant", "content": " A lighthouse. "},
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "And the second?"}, IMAGE]},
    {"role": "assistant", "content": "Two\n\nboats."},
]
SYSTEM = {"role": "system", "content": "Answer with few words."}


def check_template(processor: TokenFlexProcessor) -> list[str]:
    """Hold a processor's chat template to the laws of rendering.

    Every text lands in its own turn, once. What stands before the first learned token of an answer is the generation prompt
    that inference builds from the messages before it. A token that ends the turn is learned. The tokenizer keeps words
    apart. (What the template does to the texts themselves is held in every rendering.)

    Returns:
        What a person should know of a template that passes: lines of text.

    Raises:
        UserError: a law does not hold, or a template option that the template does not know.
    """
    where = f"model.tokenizer {processor.tokenizer.name_or_path}"
    for name in processor.chat_template_options:
        if not knows_variable(str(default_template(processor.chat_template)), name):
            raise UserError(
                f"model.chat_template_options: the chat template of {where} does not know {name!r}; "
                "name a variable that it reads, such as enable_thinking, or remove it"
            )
    advice = "name another tokenizer, or one of its templates or a mended one with model.chat_template"
    try:
        _check(processor, TURNS[:2])
        unlearned = _check(processor, TURNS)
    except (jinja2.TemplateError, ValueError) as error:
        raise UserError(f"{where}: {_one_line(error)}; {advice}") from None
    except LawBroken as error:
        raise UserError(f"{where}: the chat template {error}; {advice}") from None
    notes = []
    if unlearned:
        notes.append(
            "of a conversation's answers only the last is learned: the template writes earlier ones without what its "
            "generation prompt ends with"
        )
    try:
        _check(processor, [SYSTEM, *TURNS])
    except (jinja2.TemplateError, ValueError, LawBroken) as error:
        notes.append(f"samples with a system message will be refused ({_one_line(error)})")
    return notes


class LawBroken(Exception):
    """What a template does that it must not, as the end of a sentence."""


def _check(processor, messages):
    """How many answers of a conversation are not learned.

    Raises:
        LawBroken: a law of rendering does not hold.
    """
    num_images = sum(item == IMAGE for message in messages for item in message["content"])
    whole = processor.encode(messages, [3] * num_images)
    spans = _spans(whole.is_target)
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = {}
    for at in answers:
        images = sum(item == IMAGE for message in messages[:at] for item in message["content"])
        prompts[len(processor.encode(messages[:at], [3] * images, add_generation_prompt=True).input_ids)] = at
    end = processor.turn_end_id()
    if end is None:
        raise LawBroken("ends an answer without a token of its own, so that the model would never stop")
    for begin, stop in spans:
        at = prompts.get(begin)
        if at is None:
            raise LawBroken(f"has no generation prompt that ends before the answer at token {begin}")
        images = sum(item == IMAGE for message in messages[:at] for item in message["content"])
        prompt = processor.encode(messages[:at], [3] * images, add_generation_prompt=True)
        if whole.input_ids[:begin] != prompt.input_ids:
            raise LawBroken(f"writes other tokens before answer {answers.index(at) + 1} than its generation prompt")
        learned = processor.tokenizer.decode(whole.input_ids[begin:stop], skip_special_tokens=False)
        said, read = (_words(text) for text in (messages[at]["content"], learned))
        if any(one + other in read for one, other in zip(said, said[1:])):
            raise ValueError(
                f"its tokens of {messages[at]['content']!r} read {learned!r}: words are joined, and so they would be learned; "
                "another release of transformers may read this tokenizer aright"
            )
        if messages[at]["content"].split()[-1].casefold() not in learned.casefold():
            raise LawBroken(f"does not write the text of answer {answers.index(at) + 1} behind its generation prompt")
        if not processor.is_special(whole.input_ids[stop - 1]):
            raise LawBroken(f"does not end answer {answers.index(at) + 1} with a token of its own")
    if not spans or prompts.get(spans[-1][0]) != answers[-1]:
        raise LawBroken("does not write the last answer behind its generation prompt")
    return len(answers) - len(spans)


def _spans(is_target):
    """[(first learned token, first behind it)] of every answer."""
    edges = [at for at, (now, before) in enumerate(zip([*is_target, False], [False, *is_target])) if now != before]
    return list(zip(edges[::2], edges[1::2]))


def _words(text):
    """Its words and numbers, whatever their case: some tokenizers have one case."""
    return re.findall(r"\w+", text.casefold())


def _one_line(error):
    return " ".join(str(error).split())
