"""Other people's records -> our messages: the rules for tags, roles and turns, apart from any file.

A record is one JSON object or one row: `messages` (OpenAI, Hugging Face), `conversations` (LLaVA), `texts` (pairs of user
and assistant), `question` and `answer`, or a `caption`. Images stand in the content as items, or as `<image>` in the text
with the images listed apart, as LLaVA has them.
"""

import re

from ...data.problems import BadSample
from ...data.sample import has_answer, parse_message

TAG = "<image>"
SPECIAL_TEXT = re.compile(r"<image>|</?img>|<IMG_CONTEXT>|<\|[A-Za-z_]+\|>|</?s>")
"""What looks like a special token in somebody's text."""
_ROLE = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
_TEXT_KINDS = ("text", "input_text", "output_text")
_IMAGE_KINDS = ("image", "image_url", "input_image")


def convert_record(record, caption_prompt):
    """A record as (messages, image references in the order of their tags, names of repairs).

    A reference is whatever the record holds: a path, a `data:` URL, or bytes. `caption_prompt` is the question of a record
    that has a caption only.

    Raises:
        BadSample: no conversation in it, tags that do not match the images, nothing to learn.
    """
    if not isinstance(record, dict):
        raise BadSample("json", f"holds a {type(record).__name__}; wanted an object with a conversation")
    turns, references = _turns(record, caption_prompt), _references(record)
    turns, repairs = _tidied(turns)
    messages, ordered, more = _with_images(turns, references)
    messages = [parse_message(message) for message in messages]
    if not has_answer(messages):
        raise BadSample("no-answer", "has no assistant text to learn from")
    return messages, ordered, (*repairs, *more, *text_repairs(messages))


def text_repairs(messages):
    """`("special-text",)` where some text spells a special token, else `()`."""
    texts = (item["text"] for message in messages for item in message["content"] if item["type"] == "text")
    return ("special-text",) if any(SPECIAL_TEXT.search(text) for text in texts) else ()


def _turns(record, caption_prompt):
    """[(role, content)] of whatever form the conversation has; content is a string or a list of items."""
    if isinstance(record.get("messages"), list):
        return [_turn(message, "role", "content") for message in record["messages"]]
    if isinstance(record.get("conversations"), list):
        keys = [
            ("from", "value") if isinstance(m, dict) and "from" in m else ("role", "content")
            for m in record["conversations"]
        ]
        return [_turn(message, *key) for message, key in zip(record["conversations"], keys)]
    if isinstance(record.get("texts"), list):
        turns = []
        for pair in record["texts"]:
            if not isinstance(pair, dict) or "user" not in pair or "assistant" not in pair:
                raise BadSample("message", f"texts holds {pair!r:.80}; wanted objects with user and assistant")
            turns += [("user", pair["user"]), ("assistant", pair["assistant"])]
        return turns
    answer = next((record[key] for key in ("answer", "answers", "response") if record.get(key)), None)
    question = next((record[key] for key in ("question", "query", "prompt") if record.get(key)), None)
    if answer is not None and question is not None:
        return [("user", question), ("assistant", answer[0] if isinstance(answer, list) else answer)]
    caption = next((record[key] for key in ("caption", "text", "txt") if isinstance(record.get(key), str)), None)
    if caption is not None:
        return [("user", caption_prompt), ("assistant", caption)]
    raise BadSample(
        "json",
        f"holds the keys {sorted(map(str, record))[:8]}; wanted messages, conversations, texts, question and answer, or caption",
    )


def _turn(message, role_key, content_key):
    role = message.get(role_key) if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in _ROLE:
        raise BadSample("message", f"a turn is from {role!r:.80}; known are {', '.join(_ROLE)}")
    return _ROLE[role], message.get(content_key)


def _references(record):
    """The images that a record lists apart from its text."""
    listed = next((record[key] for key in ("images", "image") if record.get(key) is not None), [])
    return list(listed) if isinstance(listed, (list, tuple)) else [listed]


def _tidied(turns):
    """Turns that any chat template takes: no answer before the first question, roles in alternation."""
    repairs = []
    system = [turn for turn in turns if turn[0] == "system"]
    turns = [turn for turn in turns if turn[0] != "system"]
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), len(turns))
    if first:
        repairs.append("answer-first-dropped")
    joined = [("system", item) for item in _joined(system)]
    for role, content in turns[first:]:
        if len(joined) > bool(system) and joined[-1][0] == role:
            joined[-1] = (role, _items(joined[-1][1]) + [{"type": "text", "text": "\n"}] + _items(content))
            repairs.append("turns-joined")
        else:
            joined.append((role, content))
    return joined, tuple(dict.fromkeys(repairs))


def _joined(system):
    """One system message at most."""
    items = [item for _, content in system for item in _items(content)]
    return [items] if items else []


def _items(content):
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list):
        return [{"type": "text", "text": item} if isinstance(item, str) else item for item in content]
    raise BadSample("message", f"a message's content is a {type(content).__name__}; wanted a string or a list of items")


def _with_images(turns, references):
    """Messages with image items, their references in order, and repairs."""
    contents = [(role, [_item(item) for item in _items(content)]) for role, content in turns]
    explicit = [item for _, items in contents for item in items if item["type"] == "image"]
    if explicit:
        own = [item["reference"] for item in explicit]
        missing = [reference for reference in own if reference is None]
        if missing and len(own) != len(references):
            raise BadSample(
                "image-tags", f"{len(own)} image items but {len(references)} images; each image needs one item"
            )
        return _messages(contents), references if missing else own, ()
    tags = sum(item["text"].count(TAG) for role, items in contents if role == "user" for item in items)
    if tags and not references:
        return _messages(contents), [], ("tag-as-text",)
    if tags and tags != len(references):
        raise BadSample("image-tags", f"{tags} {TAG} tags but {len(references)} images; each image needs one tag")
    if references and not tags:
        first = next((i for i, (role, _) in enumerate(contents) if role == "user"), None)
        if first is None:
            raise BadSample("no-answer", "has no question")
        role, items = contents[first]
        contents[first] = (role, [{"type": "image"}] * len(references) + items)
        return _messages(contents), references, ("tag-added",)
    if tags:
        contents = [(role, _split_tags(items) if role == "user" else items) for role, items in contents]
    return _messages(contents), references, ()


def _messages(contents):
    """Messages of our own form: nothing but the text and the places of the images."""
    keep = lambda item: {"type": "image"} if item["type"] == "image" else item  # noqa: E731
    return [{"role": role, "content": [keep(item) for item in items]} for role, items in contents]


def _item(item):
    """A content item of any dialect as a text item, or as an image item with its `reference`."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind in _TEXT_KINDS and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    if kind in _IMAGE_KINDS:
        reference = next(
            (item[key] for key in ("image_url", "image", "path", "url") if item.get(key) is not None), None
        )
        return {
            "type": "image",
            "reference": reference.get("url") if isinstance(reference, dict) and "url" in reference else reference,
        }
    if isinstance(item, dict) and kind is None and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    raise BadSample("message", f"a message holds the item {item!r:.80}; wanted text or an image")


def _split_tags(items):
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
