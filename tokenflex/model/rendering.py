"""What a chat template makes of a conversation: which text lands where, where an answer begins, what of it is learned.

A template is a program, so what it does is found by running it. Once with a stand-in for every text: that gives its own
pieces, between the stand-ins, and where the generation prompt of each answer ends. And once with the texts themselves: what
comes must be those pieces with the texts put in, to the letter; a text that the template trims, cuts or rewrites is taken
as the template leaves it. Whatever cannot be laid out so is refused, never learned as something else.

Travels with every exported model, so it imports nothing but transformers and jinja2, which torch and every chat template need.
"""

import datetime
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

STAND_IN = re.compile("\ue000(\\d+)\ue001")  # private-use characters: no template writes them
MAX_KEPT = 512  # rendered texts and outlines that are kept
CALLS = {"tool_calls", "function_call"}
FORMS = ("text", "items", "mixed")
"""How a template wants content: as a string; as a list of items; or system messages as a string and others as a list."""
FAILURES = (
    jinja2.TemplateError, TypeError, KeyError, IndexError, AttributeError, ValueError, ArithmeticError, RecursionError,
)  # fmt: skip
"""What running somebody's template may raise."""
DIRECTIVE = re.compile("%([-#]?[A-Za-z%])")


class RenderingRefused(ValueError):
    """A conversation that the chat template does not render as what was said."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation.

    text: of a message as the template leaves it (`marks` in place of its images), or the template's own. message: the number
    of the message, -1 for the template. is_kept: the template has left the message's text as it was. is_learned: all of it.
    ends_turn: of the template's own text, learned up to the token that ends the turn.
    """

    text: str
    message: int = -1
    is_kept: bool = True
    is_learned: bool = False
    ends_turn: bool = False


@dataclass(frozen=True)
class Outline:
    """A template's pieces around stand-ins.

    form: one of `FORMS`. absent: what stands for the content of a message that has tool calls only. pieces [slots + 1]: the
    template's own text. slots: number of the message between two pieces. prompts: {answer: (piece, offset in it)}, where the
    generation prompt of the messages before an answer ends; answers that do not follow theirs are missing.
    """

    form: str
    absent: str | None
    pieces: tuple
    slots: tuple
    prompts: dict


class ChatRenderer:
    """Conversations through the chat templates of one tokenizer; keeps what it has rendered last.

    Messages come with their content as text (`marked_contents`), or None where a message consists of tool calls.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._kept = {}

    def pieces(
        self,
        messages: list[dict[str, Any]],
        contents: Sequence[str | None],
        template: str,
        options: dict[str, Any],
        add_generation_prompt: bool = False,
        must_teach: bool = False,
    ) -> list[Piece]:
        """A conversation as a list of `Piece`; joined, their texts are what the template writes.

        An answer is learned where the generation prompt of the messages before it stands before it, unless its message has
        the weight 0. With `must_teach`, a conversation with answers none of which does is refused.

        Raises:
            RenderingRefused: the template leaves out, repeats, moves or mixes up messages.
            jinja2.TemplateError: the template itself refuses these messages.
        """
        run = Run(self, messages, template, options)
        outline = run.outline(contents, add_generation_prompt)
        layout = Layout(run, outline, contents, add_generation_prompt)
        prompts = layout.prompts()
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant" and at]
        if must_teach and answers and not prompts:
            raise RenderingRefused(
                f"the chat template does not write its answers behind its generation prompt: message {answers[-1]} stands "
                f"behind {_tail(layout.before(answers[-1]))}, the prompt ends with "
                f"{_tail(run.prompt(contents, answers[-1], outline))}"
            )
        return layout.pieces({at: place for at, place in prompts.items() if messages[at].get("weight") != 0})

    def form(self, messages: list[dict[str, Any]], template: str, options: dict[str, Any]) -> str:
        """In which of `FORMS` a template takes the content of these messages."""
        return Run(self, messages, template, options).outline([""] * len(messages), False).form

    def closing(self, template: str, options: dict[str, Any]) -> str:
        """What a template writes between an answer and the next question.

        Raises:
            RenderingRefused, jinja2.TemplateError: it does not write them.
        """
        roles = ("user", "assistant", "user")
        outline = Run(self, [{"role": role} for role in roles], template, options).outline(["", "", ""], False)
        return outline.pieces[outline.slots.index(1) + 1]

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave for the same key before."""
        if key not in self._kept:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = make()
        return self._kept[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> "ChatRenderer":
        return type(self)(self.tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "_kept": {}}


@dataclass(frozen=True)
class Run:
    """One conversation and the template that it goes through, with the template's options."""

    renderer: ChatRenderer
    messages: list
    template: str
    options: dict

    def outline(self, contents: Sequence[str | None], add_generation_prompt: bool) -> Outline:
        """The `Outline` of this conversation.

        Raises:
            RenderingRefused: no form of content gives every text once, in order.
        """
        calls = tuple(content is None for content in contents)
        if self._is_plain():
            key = ("outline", self._key(), tuple(m["role"] for m in self.messages), calls, add_generation_prompt)
            return self.renderer.kept(key, lambda: self._outline(calls, add_generation_prompt))
        return self._outline(calls, add_generation_prompt)

    def _outline(self, calls, add_generation_prompt):
        stand_ins = [None if is_call else _stand_in(at) for at, is_call in enumerate(calls)]
        wanted = tuple(at for at, is_call in enumerate(calls) if not is_call)
        problem = None
        for form in FORMS:
            for absent in ("", None) if any(calls) else ("",):
                try:
                    text = self.text(stand_ins, form, absent, add_generation_prompt)
                except FAILURES as error:
                    problem = problem or self._failure(error)
                    continue
                slots = tuple(int(match[1]) for match in STAND_IN.finditer(text))
                if slots == wanted and self._has_calls(text, stand_ins, form, absent, add_generation_prompt):
                    return self._with_prompts(text, stand_ins, form, absent, slots)
                problem = RenderingRefused(self._misplaced(slots, wanted)) if problem is None else problem
        raise problem

    def _with_prompts(self, text, stand_ins, form, absent, slots):
        pieces = tuple(STAND_IN.split(text)[::2])
        outline = Outline(form, absent, pieces, slots, {})
        starts = _starts(pieces, [stand_ins[at] for at in slots])
        for at, message in enumerate(self.messages):
            if message["role"] != "assistant" or not at:
                continue
            number = slots.index(at) if at in slots else sum(slot < at for slot in slots)
            prompt = self.prompt(stand_ins, at, outline)
            offset = len(prompt) - starts[number] if prompt is not None and text.startswith(prompt) else -1
            if 0 <= offset <= len(pieces[number]):
                outline.prompts[at] = (number, offset)
        return outline

    def prompt(self, contents: Sequence[str | None], at: int, outline: Outline) -> str | None:
        """The generation prompt that inference builds before message `at`; None where the template has none."""
        try:
            return self.text(contents, outline.form, outline.absent, True, at)
        except FAILURES:
            return None

    def text(
        self,
        contents: Sequence[str | None],
        form: str,
        absent: str | None = "",
        add_generation_prompt: bool = False,
        num_messages: int | None = None,
    ) -> str:
        """What the template writes of the first `num_messages` messages, by default all, with these texts as content."""
        messages = self.messages[:num_messages]
        if self._is_plain():
            said = tuple(zip((m["role"] for m in messages), contents))
            key = ("text", self._key(), said, form, absent, add_generation_prompt)
            return self.renderer.kept(key, lambda: self._text(messages, contents, form, absent, add_generation_prompt))
        return self._text(messages, contents, form, absent, add_generation_prompt)

    def _text(self, messages, contents, form, absent, add_generation_prompt):
        filled = []
        for message, content in zip(messages, contents):
            is_list = form == "items" or (form == "mixed" and message["role"] != "system")
            value = absent if content is None else [{"type": "text", "text": content}] if is_list else content
            filled.append({**{k: v for k, v in message.items() if v is not None and k != "weight"}, "content": value})
        return self.renderer.tokenizer.apply_chat_template(
            filled,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.options,
        )

    def checked_text(self, contents: Sequence[str | None], outline: Outline, add_generation_prompt: bool) -> str:
        """`text` in the form of an outline; a failure that is not the template's own refusal is named."""
        try:
            return self.text(contents, outline.form, outline.absent, add_generation_prompt)
        except FAILURES as error:
            raise self._failure(error) from None

    def _is_plain(self):
        """Whether roles and texts are all there is to the messages."""
        return all(message.keys() <= {"role", "content", "weight"} for message in self.messages)

    def _key(self):
        return self.template, repr(sorted(self.options.items()))

    def _failure(self, error):
        if isinstance(error, jinja2.TemplateError):
            return error
        return RenderingRefused(f"the chat template fails on these messages ({type(error).__name__}: {error})")

    def _has_calls(self, text, stand_ins, form, absent, add_generation_prompt):
        """Whether the template writes the tool calls of every message that has some."""
        for at, message in enumerate(self.messages):
            if CALLS & message.keys():
                silent = {key: value for key, value in message.items() if key not in CALLS}
                others = replace(self, messages=[*self.messages[:at], silent, *self.messages[at + 1 :]])
                try:
                    if others.text(stand_ins, form, absent or "", add_generation_prompt) == text:
                        return False
                except FAILURES:
                    continue
        return True

    def _misplaced(self, slots, wanted):
        say = lambda at: f"message {at} ({self.messages[at]['role']})"  # noqa: E731
        for at in wanted:
            if at not in slots:
                return f"the chat template leaves out the text of {say(at)}"
            if slots.count(at) > 1:
                return f"the chat template writes the text of {say(at)} {slots.count(at)} times"
        moved = next((at for at, other in zip(slots, wanted) if at != other), None)
        if moved is None:
            return "the chat template leaves out the tool calls of a message"
        return f"the chat template moves the text of {say(moved)} out of its order"


class Layout:
    """A conversation's own texts in the slots of its outline.

    Raises:
        RenderingRefused: they and the template's pieces are not what the template writes of this conversation.
    """

    def __init__(self, run: Run, outline: Outline, contents: Sequence[str | None], add_generation_prompt: bool):
        self.run, self.outline, self.contents = run, outline, contents
        self.own, self.texts = list(outline.pieces), [contents[at] for at in outline.slots]
        self.lost = [0] * len(self.own)  # how many characters of each piece's beginning are in the slot before it
        text = run.checked_text(contents, outline, add_generation_prompt)
        if text != self.joined():
            for number, at in enumerate(outline.slots):
                self._fit(number, at, add_generation_prompt)
            if text != self.joined():
                raise RenderingRefused(
                    "the chat template writes a message otherwise depending on the text of another: where "
                    f"{_difference(self.joined(), text)}"
                )

    def joined(self, number: int | None = None) -> str:
        """The whole text, or what stands before piece `number`."""
        return "".join(part for pair in zip(self.own[:number], [*self.texts, ""]) for part in pair)

    def before(self, at: int) -> str:
        """The text before that of message `at`."""
        number = self.outline.slots.index(at) if at in self.outline.slots else len(self.outline.slots)
        return self.joined(number) + self.own[number]

    def _fit(self, number, at, add_generation_prompt):
        """Put what the template leaves of message `at` into slot `number`, the other slots holding their stand-ins.

        Where the text changes the template's own words beside it (a think block that is empty or not), these become part of
        the slot; they must hold no special token, which as a part of the text would be mere text.
        """
        pieces, slots = self.outline.pieces, self.outline.slots
        stand_ins = [None if content is None else _stand_in(i) for i, content in enumerate(self.contents)]
        before, after = pieces[number], pieces[number + 1]
        parts = [part for pair in zip(pieces, [*(stand_ins[i] for i in slots), ""]) for part in pair]
        head, tail = "".join(parts[: 2 * number]), "".join(parts[2 * number + 3 :])
        alone = [self.contents[at] if i == at else stand_in for i, stand_in in enumerate(stand_ins)]
        came = self.run.checked_text(alone, self.outline, add_generation_prompt)
        inner = came[len(head) : len(came) - len(tail)]
        low = _common(before, inner)
        high = _common(after[::-1], inner[low:][::-1])
        text, taken = inner[low : len(inner) - high], before[low:] + after[: len(after) - high]
        lost = len(before) - low
        if (
            came != head + inner + tail
            or lost > len(self.own[number])
            or any(token in taken or text.count(token) > alone[at].count(token) for token in self._special())
        ):
            role = self.run.messages[at]["role"]
            raise RenderingRefused(f"the chat template rewrites message {at} ({role}) depending on its text")
        self.own[number] = self.own[number][: len(self.own[number]) - lost]
        self.own[number + 1], self.lost[number + 1] = after[len(after) - high :], len(after) - high
        self.texts[number] = text

    def _special(self):
        tokens = self.run.renderer.tokenizer.added_tokens_decoder.values()
        return [token.content for token in tokens if token.special]

    def prompts(self) -> dict[int, tuple[int, int]]:
        """{answer: (piece, offset)} of the answers that follow the generation prompt of the messages before them."""
        found = {}
        for at, (number, offset) in self.outline.prompts.items():
            offset -= self.lost[number]
            if 0 <= offset <= len(self.own[number]):
                prompt = self.run.prompt(self.contents, at, self.outline)
                if prompt == self.joined(number) + self.own[number][:offset]:
                    found[at] = (number, offset)
        return found

    def pieces(self, prompts: dict[int, tuple[int, int]]) -> list[Piece]:
        """The pieces of the conversation, of which the answers in `prompts` are learned from there on to their end."""
        pieces, is_answer = [], False
        for number, own in enumerate(self.own):
            places = sorted((offset, at) for at, (place, offset) in prompts.items() if place == number)
            begin = 0
            for offset, at in [*places, (len(own), None)]:
                pieces.append(Piece(own[begin:offset], ends_turn=is_answer))
                begin, is_answer = offset, at is not None
            if number == len(self.outline.slots):
                break
            at = self.outline.slots[number]
            is_answer = at in prompts
            if is_answer:  # what stands between the prompt and the text is learned whole
                pieces[-1] = replace(pieces[-1], ends_turn=False, is_learned=True)
            text = self.texts[number]
            pieces.append(Piece(text, at, is_kept=text == self.contents[at], is_learned=is_answer))
        return [piece for piece in pieces if piece.text or piece.message >= 0 or piece.ends_turn]


def marked_contents(
    contents: list[list[dict[str, Any]] | None], length: int
) -> tuple[list[str | None], re.Pattern[str]]:
    """(texts, marks): each message's items as one text with a mark and a line break for an image; None stays None.

    `marks` is a pattern that finds them; its characters are in none of the texts. A mark has `length` characters, those of
    the tag that it stands for, since templates may cut.
    """
    texts = [item["text"] for items in contents if items for item in items if item["type"] == "text"]
    pairs = ((chr(code), chr(code + 1)) for code in range(0xE002, 0xF8FE, 2))
    begin, end = next(pair for pair in pairs if not any(mark in text for mark in pair for text in texts))
    number, marked = 0, []
    for items in contents:
        parts = []
        for item in items or ():
            if item["type"] == "image":
                parts.append(f"{begin}{number:0{length - 2}d}{end}\n")
                number += 1
            else:
                parts.append(item["text"])
        marked.append(None if items is None else "".join(parts))
    return marked, re.compile(f"{begin}(\\d+){end}")


def dated_template(template: str, date: str) -> str:
    """The template with `date` (ISO, or nothing for the day on which it runs) as what `strftime_now` tells it."""
    if not date or "strftime_now" not in template:
        return template
    day = datetime.datetime.fromisoformat(str(date))
    spelled = "format"
    for directive in sorted({*DIRECTIVE.findall(template), *"YmdBbAaHMSyjp"}):
        value = day.strftime(f"%{directive}")
        spelled += f' | replace("%{directive}", "{value}")'
    return "{%- macro strftime_now(format) -%}{{ " + spelled + ' }}{%- endmacro -%}{{ "" }}' + template


def knows_variable(template: str, name: str) -> bool:
    """Whether a template's text has `name` in it, as a word."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _stand_in(number):
    return f"\ue000{number}\ue001"


def _starts(pieces, texts):
    """Where each of the pieces begins in the whole text."""
    starts = [0]
    for piece, text in zip(pieces, texts):
        starts.append(starts[-1] + len(piece) + len(text))
    return starts


def _common(one, other):
    """Length of the common beginning of two texts."""
    for at, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return at
    return min(len(one), len(other))


def _tail(text):
    return "nothing" if text is None else repr(text[-40:])


def _difference(one, other):
    at = _common(one, other)
    return f"{one[max(0, at - 10) : at + 30]!r} it writes {other[max(0, at - 10) : at + 30]!r}"
