"""Other people's records -> our messages: the rules for tags, roles and turns, apart from any file.

A record is one JSON object or one row: `messages` (OpenAI, Hugging Face), `conversations` (LLaVA), `texts` (pairs of user
and assistant), `instruction`, `input` and `output` with their `history`, `question` and `answer`, or a `caption` of images.
Images stand in the content as items, or as `<image>` in the text with the images listed apart, as LLaVA has them. What else a
record holds is judged in `fields.py`.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from ...data.problems import BadSample
from ...data.sample import Message, has_answer, parse_message
from .fields import (
    UNLEARNED,
    WEIGHTS,
    Clip,
    Fields,
    as_answer,
    check_media,
    check_unused,
    clips_of,
    column_options,
    first_of,
    holds,
    image_fields,
    video_fields,
    weight_of,
    with_options,
)

TAG = "<image>"
OTHER_TAGS = re.compile(
    r"<ImageHere>|<image[ _-](\d+)>|<\|image_(\d+)\|>|<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<\|image\|>|<IMAGE>|<Image>|"
    r"\[IMG\]|\[IMAGE\]|<image_placeholder>|\{image\}"
)
_PLACE = rf"(?:<image>|{OTHER_TAGS.pattern}|!\[[^\]\n]*\]\([^)\n]+\)|<img\b[^>\n]*>)"
TAG_OF_ITS_OWN = re.compile(rf"\A\s*{_PLACE}|\n\s*{_PLACE}\s*\Z")
"""A tag at the beginning or on a line at the end, where an image is put, and not a word of a sentence."""
TRANSCRIPT = re.compile(r"^\s*(#+ ?(Human|User)|USER:|Human:|<\|im_start\|>|\[INST\])", re.MULTILINE)
"""How a text begins that is a whole conversation."""
VIDEO_TAG = re.compile(r"<video>", re.IGNORECASE)
VIDEO_TAG_OF_ITS_OWN = re.compile(r"\A\s*<video>|\n\s*<video>\s*\Z", re.IGNORECASE)
OTHER_MEDIA_TAGS = re.compile(r"<(video|audio|speech|sound)>", re.IGNORECASE)
INLINE_IMAGE = re.compile(r"<img>([^<>\n]+\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|heic))</img>", re.IGNORECASE)
SPECIAL_TEXT = re.compile(r"<image>|</?img>|<IMG_CONTEXT>|<\|[A-Za-z_]+\|>|</?s>")
"""What looks like a special token in somebody's text."""
_ROLE = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",
}
_TOOL_ROLE = {
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "user",
    "tool": "user",
    "function": "user",
}
_TEXT_KINDS = ("text", "input_text", "output_text")
_IMAGE_KINDS = ("image", "image_url", "input_image")
_VIDEO_KINDS = ("video", "video_url", "input_video")
_REFERENCES = ("image_url", "image", "path", "url")
_CLIP_REFERENCES = ("video_url", "video", "frames", "path", "url")
QUESTIONS, ANSWERS = ("question", "query", "prompt"), ("answer", "answers", "response", "completion")
OUTPUTS = ("output", *ANSWERS)
CAPTIONS = ("caption", "captions", "text", "txt")
SYSTEM = ("system", "system_prompt", "system_message", "sys_prompt", "system_instruction")
OPTIONS = ("options", "choices", "candidates")


@dataclass(frozen=True)
class Converted:
    """A record as messages; references: its images, and a `Clip` for a video, in the order of their tags, which are image items all;
    repairs: names; unread: fields to be counted."""

    messages: list[Message]
    references: list
    repairs: tuple[str, ...]
    unread: tuple[str, ...] = ()


@dataclass
class Turn:
    """Somebody's turn; content: a string or a list of items; weight: 0 where it is not to be learned."""

    role: str
    content: Any
    weight: int = 1


def convert_record(record: object, caption_prompt: str, tool_turns: str = "skip") -> Converted:
    """A record as `Converted`.

    A reference is whatever the record holds: a path, a `data:` URL, or bytes. `caption_prompt` is the question of a record
    that has a caption only. `tool_turns`: whether a record with calls of functions and their results is skipped (`skip`) or
    has them as text with their role (`text`).

    Raises:
        BadSample: no conversation in it, tags that do not match the images, something that would not be said or shown,
            nothing to learn.
    """
    if not isinstance(record, dict):
        raise BadSample("json", f"holds a {type(record).__name__}; wanted an object with a conversation")
    clips, clip_keys = video_fields(record)
    references, image_keys = image_fields(record)
    check_media(record, bool(clips))
    if clips and references:
        raise BadSample(
            "field",
            "has images and videos in fields of their own, so that their order is not clear; put them into the messages",
        )
    references = references or list(clips)
    reading = _Reading(record, caption_prompt, tool_turns)
    turns = reading.turns(references)
    of_items = _unread_of_items(turns)
    turns, repairs = _tidied(turns)
    messages, ordered, more = _with_images(turns, references)
    messages = [parse_message(message) for message in messages]
    if not has_answer(messages):
        raise BadSample("no-answer", "has no assistant text to learn from")
    if any(
        not has_answer([message]) for message in messages if message["role"] == "assistant" and "weight" not in message
    ):
        raise BadSample("no-answer", "has an answer without text, which would be learned as saying nothing")
    said = "\n".join(item["text"] for message in messages for item in message["content"] if item["type"] == "text")
    used = reading.used | image_keys | clip_keys
    unread = (*check_unused(record, used, said, shown=ordered), *reading.unread, *of_items)
    return Converted(messages, ordered, (*reading.repairs, *repairs, *more, *text_repairs(messages)), unread)


def text_repairs(messages: list[Message]) -> tuple[str, ...]:
    """`("special-text",)` where some text spells a special token, else `()`."""
    texts = (item["text"] for message in messages for item in message["content"] if item["type"] == "text")
    return ("special-text",) if any(SPECIAL_TEXT.search(text) for text in texts) else ()


class _Reading:
    """The turns of one record, of whatever form; notes which of its fields were used and which of a turn's were not."""

    def __init__(self, record: Fields, caption_prompt: str, tool_turns: str):
        self.record, self.caption_prompt, self.tool_turns = record, caption_prompt, tool_turns
        self.used: set[str] = set()
        self.unread: list[str] = []
        self.repairs: list[str] = []

    def turns(self, references: list) -> list[Turn]:
        """What is said, in order.

        Raises:
            BadSample: see `convert_record`.
        """
        turns = self._said() or self._asked() or self._captioned(references)
        if turns is None:
            keys = sorted(map(str, self.record))[:8]
            raise BadSample(
                "json",
                f"holds the keys {keys}; wanted messages, conversations, texts, instruction and output, question and answer, or caption",
            )
        return [*self._system(turns), *turns]

    def _take(self, keys: tuple[str, ...]) -> Any:
        key = first_of(self.record, keys)
        if key is None:
            return None
        self.used.add(key)
        return self.record[key]

    def _said(self) -> list[Turn] | None:
        """Turns that the record has as a list."""
        lists = [
            key
            for key in ("messages", "conversations", "conversation", "texts")
            if isinstance(self.record.get(key), list)
        ]
        key = next((key for key in lists if self.record[key]), lists[0] if lists else None)
        if key is None:
            return None
        self.used.add(key)
        if not self.record[key]:
            raise BadSample("no-answer", f"its {key} are empty")
        if key != "texts":
            return [self._turn(message) for message in self.record[key]]
        turns = []
        for pair in self.record[key]:
            if not isinstance(pair, dict) or "user" not in pair or "assistant" not in pair:
                raise BadSample("message", f"texts holds {pair!r:.80}; wanted objects with user and assistant")
            self.unread += check_unused(pair, {"user", "assistant"}, "", "turn.")
            turns += [Turn("user", pair["user"]), Turn("assistant", self._answer(pair["assistant"]))]
        return turns

    def _asked(self) -> list[Turn] | None:
        """A question (or instruction) and its answer, what was said before them, and the options of a choice."""
        is_instruction = holds(self.record.get("instruction"))
        question = self._take(("instruction",) if is_instruction else QUESTIONS)
        answer = self._take(OUTPUTS if is_instruction or holds(self.record.get("output")) else ANSWERS)
        if question is None:
            self.used -= set(OUTPUTS)
            return None
        if isinstance(question, (list, tuple)) and len(question) > 1 and all(isinstance(one, str) for one in question):
            raise BadSample("message", f"holds {len(question)} questions in one field; wanted one, or a list of turns")
        self._one_of(OUTPUTS)
        self._one_of(QUESTIONS)
        if answer is None:
            raise BadSample("no-answer", "has a question and no answer")
        answer = self._answer(answer)
        if is_instruction and holds(self.record.get("input")):
            more = self._take(("input",))
            if not isinstance(question, str) or not isinstance(more, str):
                raise BadSample("message", f"its input is {more!r:.80}; wanted a text")
            question = f"{question}\n{more}"
        options = self._take(OPTIONS)
        if options is None:
            options, fields = column_options(self.record)
            self.used |= fields
        if options:
            question, answer = with_options(question, options, answer)
        return [*self._history(), Turn("user", question), Turn("assistant", answer)]

    def _one_of(self, keys):
        """That those of the fields `keys` that hold a text hold the same.

        Raises:
            BadSample: they do not, so that it is not clear which one counts.
        """
        held = [key for key in keys if isinstance(self.record.get(key), str) and holds(self.record[key])]
        if len({self.record[key].strip() for key in held}) > 1:
            raise BadSample("field", f"the fields {held} hold different texts; wanted one")

    def _history(self) -> list[Turn]:
        history = self._take(("history",))
        turns = []
        for pair in history or []:
            if isinstance(pair, dict) and set(pair) <= {"user", "assistant"}:
                pair = (pair.get("user"), pair.get("assistant"))
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise BadSample("field", f"its history holds {pair!r:.80}; wanted pairs of question and answer")
            turns += [Turn("user", pair[0]), Turn("assistant", self._answer(pair[1]))]
        return turns

    def _captioned(self, references: list) -> list[Turn] | None:
        caption = self._take(CAPTIONS)
        if caption is None:
            return None
        if not references:
            raise BadSample("image-missing", "has a caption and no image that it could be the caption of")
        caption = self._answer(caption)
        if isinstance(caption, str) and (TRANSCRIPT.search(caption) or TAG in caption):
            raise BadSample("message", f"its only text is a whole conversation ({caption!r:.60}); wanted it as turns")
        return [Turn("user", self.caption_prompt), Turn("assistant", caption)] if isinstance(caption, str) else None

    def _system(self, turns: list[Turn]) -> list[Turn]:
        """System turns that stand beside the conversation: its text, and the tools where they are to be text."""
        before: list[Turn] = []
        for key in SYSTEM:
            value = self.record.get(key)
            if holds(value):
                self.used.add(key)
                if not isinstance(value, str):
                    raise BadSample("field", f"its {key} is {value!r:.80}; wanted a text")
                if not any(turn.role == "system" and turn.content == value for turn in [*before, *turns]):
                    before.append(Turn("system", value))
        for key in ("tools", "functions"):
            if self.tool_turns == "text" and holds(self.record.get(key)):
                self.used.add(key)
                before.append(Turn("system", f"[{key}]\n{_as_text(self.record[key])}"))
        return before

    def _answer(self, value: Any) -> Any:
        value, repairs = as_answer(value)
        self.repairs += repairs
        return value

    def _turn(self, message: Any) -> Turn:
        role_key, key = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
        said = message.get(role_key) if isinstance(message, dict) else None
        name = said.casefold() if isinstance(said, str) else None
        used = {role_key, key, "images", *WEIGHTS, *UNLEARNED, "tool_calls", "function_call"}
        if name not in _ROLE and name not in _TOOL_ROLE:
            raise BadSample("message", f"a turn is from {said!r:.80}; known are {', '.join(_ROLE)}")
        role, content = _ROLE.get(name) or _TOOL_ROLE[name], message.get(key)
        calls = next((message[k] for k in ("tool_calls", "function_call") if holds(message.get(k))), None)
        if name in _TOOL_ROLE or calls is not None:
            if self.tool_turns != "text":
                raise BadSample(
                    "message",
                    f"a turn of {said!r:.40} calls a function or has its result; --tool-turns text takes it as text",
                )
            content = content if calls is None else "\n".join([*([content] if content else []), _as_text(calls)])
            content = f"[{name if name in _TOOL_ROLE else 'function_call'}]\n{content if isinstance(content, str) else _as_text(content)}"
        elif role == "assistant" and isinstance(content, (int, float)):
            content = self._answer(content)
        if isinstance(content, list) and len(content) > 1 and all(isinstance(item, str) for item in content):
            raise BadSample("message", f"a turn holds {len(content)} texts; wanted one, or items with their type")
        if holds(message.get("images")):
            content = _with_own_images(content, message["images"])
        self.unread += check_unused(message, used, content if isinstance(content, str) else "", "turn.")
        return Turn(role, content, weight_of(message, role))


def _unread_of_items(turns: list[Turn]) -> list[str]:
    """The names of fields of content items that are not read, to be counted.

    Raises:
        BadSample: one of them says or shows something, such as a crop, or an image within an item of text.
    """
    unread = []
    for turn in turns:
        for item in turn.content if isinstance(turn.content, list) else ():
            if isinstance(item, dict):
                references = _references_of(item)
                read = (*references, "index", "detail") if references else ("text",)
                unread += check_unused(item, {"type", *read}, "", "item.")
                held = [_address(item[key]) for key in references if item.get(key) is not None]
                if any(entry != held[0] for entry in held):
                    raise BadSample("field", f"an item names {len(held)} images or clips ({item!r:.80}); wanted one")
    return unread


def _references_of(item: dict) -> tuple[str, ...]:
    """The fields in which an item of its type names what it shows; none for one of text."""
    kind = item.get("type")
    return _REFERENCES if kind in _IMAGE_KINDS else _CLIP_REFERENCES if kind in _VIDEO_KINDS else ()


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _with_own_images(content: Any, images: Any) -> list:
    """A turn that brings its images along: at its tags, or before its text."""
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    shown = [{"type": "image", "image": image} for image in images]
    items = _items(content)
    tags = sum(
        item["text"].count(TAG) for item in items if isinstance(item, dict) and isinstance(item.get("text"), str)
    )
    if not tags:
        return [*shown, *items]
    if tags != len(images):
        raise BadSample("image-tags", f"{tags} {TAG} tags but {len(images)} images in a turn; each image needs one tag")
    following = iter(shown)
    return [
        next(following) if item["type"] == "image" else item for item in _split_tags([_item(item) for item in items])
    ]


def _tidied(turns: list[Turn]) -> tuple[list[Turn], tuple[str, ...]]:
    """Turns that any chat template takes: no answer before the first question, roles in alternation."""
    repairs = []
    answered = next((i for i, turn in enumerate(turns) if turn.role == "assistant"), len(turns))
    if any(turn.role == "system" for turn in turns[answered:]):
        raise BadSample("message", "a system turn stands behind an answer; wanted it before the conversation")
    system = [turn for turn in turns if turn.role == "system"]
    turns = [turn for turn in turns if turn.role != "system"]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    if first:
        repairs.append("answer-first-dropped")
    joined = _joined_system(system)
    for turn in turns[first:]:
        if len(joined) > bool(system) and joined[-1].role == turn.role:
            before = joined[-1]
            if before.weight != turn.weight and turn.role == "assistant":
                raise BadSample("message", "two answers in a row, of which one is not to be learned; join or part them")
            content = _items(before.content) + [{"type": "text", "text": "\n"}] + _items(turn.content)
            joined[-1] = Turn(turn.role, content, turn.weight)
            repairs.append("turns-joined")
        else:
            joined.append(turn)
    return joined, tuple(dict.fromkeys(repairs))


def _joined_system(system: list[Turn]) -> list[Turn]:
    """One system message at most, its texts under each other."""
    items: list = []
    for turn in system:
        items += [{"type": "text", "text": "\n"}] * bool(items) + _items(turn.content)
    return [Turn("system", items)] if items else []


def _items(content: Any) -> list:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list):
        return [{"type": "text", "text": item} if isinstance(item, str) else item for item in content]
    raise BadSample("message", f"a message's content is a {type(content).__name__}; wanted a string or a list of items")


def _with_images(turns: list[Turn], references: list) -> tuple[list, list, tuple[str, ...]]:
    """Messages with image items, their references in order, and repairs."""
    contents = [(turn, _spelled(turn, [_item(item) for item in _items(turn.content)], references)) for turn in turns]
    explicit = [item for _, items in contents for item in items if item["type"] == "image"]
    heard = any(
        OTHER_MEDIA_TAGS.search(item.get("text", ""))
        for turn, items in contents
        if turn.role == "user"
        for item in items
    )
    repairs = ("tag-as-text",) if heard else ()
    if explicit:
        return _messages(contents), _explicit(explicit, references), repairs
    asked = [item["text"] for turn, items in contents if turn.role == "user" for item in items]
    place = next(filter(None, map(TAG_OF_ITS_OWN.search, asked)), None)
    if place and not references:
        raise BadSample("image-missing", f"a question has {place[0].strip():.80} where an image is put, and none came")
    tags = sum(text.count(TAG) for text in asked)
    if tags and not references:
        return _messages(contents), [], ("tag-as-text",)
    if tags and tags != len(references):
        raise BadSample("image-tags", f"{tags} {TAG} tags but {len(references)} images; each image needs one tag")
    if references and not tags:
        first = next((i for i, (turn, _) in enumerate(contents) if turn.role == "user"), None)
        if first is None:
            raise BadSample("no-answer", "has no question")
        turn, items = contents[first]
        contents[first] = (turn, [{"type": "image"}] * len(references) + items)
        return _messages(contents), references, ("tag-added", *repairs)
    if tags:
        contents = [(turn, _split_tags(items) if turn.role == "user" else items) for turn, items in contents]
    return _messages(contents), references, repairs


def _explicit(explicit: list, references: list) -> list:
    """The references of image items: their own, or those of the record where they have none."""
    own, numbers = [item["reference"] for item in explicit], [item.get("index") for item in explicit]
    if references and all(type(number) is int and 0 <= number < len(references) for number in numbers):
        own = [references[number] if entry is None else entry for entry, number in zip(own, numbers)]
        if sorted(numbers) == list(range(len(references))):
            return own
    missing = [reference for reference in own if reference is None]
    if missing and (len(own) != len(references) or len(missing) != len(own)):
        raise BadSample("image-tags", f"{len(own)} image items but {len(references)} images; each image needs one item")
    if references and not missing and references != own:
        raise BadSample("field", "the record's images are others than those in its messages; wanted them in one place")
    return references if missing else own


def _spelled(turn: Turn, items: list, references: list) -> list:
    """A question's items with other ways to write a tag put right: `<image_1>` and the like, `<img>a.jpg</img>`."""
    if turn.role != "user":
        return items
    spelled = []
    has_clips = any(isinstance(reference, Clip) for reference in references)
    for item in items:
        text = item.get("text", "")
        if has_clips:
            text = VIDEO_TAG.sub(TAG, text)
        elif VIDEO_TAG_OF_ITS_OWN.search(text) and not _is_shown(items):
            raise BadSample("clip", "a question has <video> where a clip is put, and none came")
        numbers = [int(found[1] or found[2] or 0) for found in OTHER_TAGS.finditer(text)]
        if references and numbers:
            if numbers not in ([0] * len(numbers), [*range(1, len(references) + 1)]) or TAG in text:
                raise BadSample(
                    "image-tags", f"the tags {OTHER_TAGS.findall(text)[:4]} are not one per image, in order"
                )
            text = OTHER_TAGS.sub(TAG, text)
        parts = INLINE_IMAGE.split(text)
        if item["type"] == "image" or len(parts) == 1:
            spelled.append({**item, "text": text} if item["type"] == "text" else item)
            continue
        for at, part in enumerate(parts):
            spelled += (
                [{"type": "image", "reference": part}] if at % 2 else [{"type": "text", "text": part}] if part else []
            )
    return spelled


def _is_shown(items: list) -> bool:
    """Whether a turn shows a clip by an item of its own, so that a tag beside it is a word."""
    return any(isinstance(item.get("reference"), Clip) for item in items)


def _messages(contents: list) -> list[dict]:
    """Messages of our own form: nothing but the text and the places of the images, and a weight of 0."""
    keep = lambda item: {"type": "image"} if item["type"] == "image" else item  # noqa: E731
    unlearned = lambda turn: {"weight": 0} if turn.role == "assistant" and not turn.weight else {}  # noqa: E731
    return [
        {"role": turn.role, "content": [keep(item) for item in items], **unlearned(turn)} for turn, items in contents
    ]


def _item(item: Any) -> dict:
    """A content item of any dialect as a text item, or as an image item with its `reference`."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind in _TEXT_KINDS and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    if kind in _VIDEO_KINDS:
        reference = next((item[key] for key in _CLIP_REFERENCES if item.get(key) is not None), None)
        reference = reference.get("url") if isinstance(reference, dict) and "url" in reference else reference
        clips = clips_of([] if reference is None else reference)
        if reference is not None and len(clips) != 1:
            raise BadSample("clip", f"a video item holds {len(clips)} clips; wanted one file, or the frames of one")
        return {"type": "image", "reference": clips[0] if clips else None}
    if kind in _IMAGE_KINDS:
        reference = next((item[key] for key in _REFERENCES if item.get(key) is not None), None)
        return {"type": "image", "reference": _address(reference), "index": item.get("index")}
    if isinstance(item, dict) and kind is None and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    raise BadSample("message", f"a message holds the item {item!r:.80}; wanted text or an image")


def _address(reference: Any) -> Any:
    """What an image item refers to: `{"url": ...}` is how some write an address."""
    return reference.get("url") if isinstance(reference, dict) and "url" in reference else reference


def _split_tags(items: list) -> list:
    """Text items parted at their tags; the line break that LLaVA writes beside a tag goes with it."""
    parted = []
    for item in items:
        pieces = item["text"].split(TAG)
        for i, piece in enumerate(pieces):
            if i:
                parted.append({"type": "image"})
                piece = piece.removeprefix("\n")
            if i < len(pieces) - 1 and not piece.strip("\n"):
                piece = ""
            if piece:
                parted.append({"type": "text", "text": piece})
    return parted
