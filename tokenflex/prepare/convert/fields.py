"""Which fields of somebody's record are read, and as what; the rest is bookkeeping, or is counted, or leads to a skip.

The law: a field that changes what a conversation says or shows is used, or its record is skipped with the field's name.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...data.problems import BadSample

Fields = dict[str, Any]

IMAGE_KEYS = (
    "images", "image", "image_path", "image_paths", "image_file", "image_files", "image_name", "image_filename",
    "img", "imgs", "img_path", "img_paths", "image_url", "image_urls", "image_bytes", "image_base64", "picture", "pictures",
    "photo", "photos", "jpg", "jpeg", "png", "webp",
)  # fmt: skip
"""Fields that hold images, first those that are asked first; `image_1`, `image_2`, ... too."""
FILE_KEYS = ("file_name", "filename", "file", "path", "filepath", "file_path")
"""Fields that name an image file where no other field does, if the name looks like one."""
NUMBERED_IMAGE = re.compile(r"(?:image|img)_?(\d+)")
BASE64_IMAGE = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/=\s]{40}")
"""How JPEG, PNG, GIF and WebP begin in base64."""
MEDIA_NAME = re.compile(r"\.(mp4|webm|mov|avi|mkv|wav|mp3|flac|ogg|m4a|pdf|docx?|pptx?)$", re.IGNORECASE)
IMAGE_NAME = re.compile(r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|heif|mpo)$", re.IGNORECASE)
VIDEO_KEY = re.compile(r"(videos?|mp4)(_(path|file|url|name)s?)?|frames", re.I)
"""Fields that hold videos, or the frames of one."""
OTHER_MEDIA = re.compile(
    r"(videos?|audios?|speech|sounds?|wavs?|mp3|mp4|point_?clouds?|pdfs?|documents?)(_(path|file|url|name|id)s?)?", re.I
)
"""Fields that show or play something that is no image."""
CHANGES_THE_TEXT = (
    "context", "passage", "hint", "lecture", "rationale", "explanation", "reasoning", "reasoning_content", "thinking",
    "prefix", "suffix", "objects", "bbox", "bboxes", "boxes", "chosen", "rejected", "functions", "tools", "history", "options",
    "choices", "candidates", "system", "system_prompt", "input", "instruction", "instructions", "question", "query",
    "tool_calls", "function_call", "cot", "chain_of_thought", "thought", "thoughts", "analysis", "solution", "steps",
    "crop", "crop_box", "roi", "region", "regions", "rotation", "rotate", "flip", "visual_prompt",
    "correct_answer", "ground_truth", "gold", "gold_answer", "reference_answer", "code",
)  # fmt: skip
"""Fields that say or show something where they hold something; what is not used of them leads to a skip."""
WEIGHTS = ("weight", "loss", "loss_weight", "train", "trainable", "learn", "loss_mask")
UNLEARNED = ("mask", "masked", "is_masked", "ignore_loss", "no_loss", "skip_loss")
"""Fields of a turn that say whether it is learned, or that it is not."""
KEPT = (
    "correct", "is_correct", "is_valid", "valid", "is_right", "passed", "keep", "kept", "accepted", "approved", "sample_weight", *WEIGHTS,
)  # fmt: skip
"""Fields that, where they are false or 0, say that the answer is not one to learn."""
DROPPED = (
    "skip", "skipped", "delete", "deleted", "is_deleted", "removed", "exclude", "excluded", "ignore", "ignored", "discard", "discarded",
    "invalid", "is_invalid", *UNLEARNED,
)  # fmt: skip
"""Fields that say so where they are true."""
SAYING = frozenset(
    """system sys preamble persona instruction instructions prompt prompts context contexts passage passages paragraph paragraphs article
    articles story premise hint hints lecture rationale rationales reasoning thinking thought thoughts cot prefix suffix refusal history
    conversation conversations dialog dialogs dialogue dialogues messages turns qa qas options choices bbox bboxes
    bounding crop roi attachment attachments knowledge""".split()
)
"""Words in the name of a field that says or shows something, whatever stands beside them: `pre_prompt`, `systemMessage`, `qa-pairs`."""
SHOWING = frozenset("image images img imgs picture pictures photo photos screenshot screenshots".split())
"""Words in the name of a field that holds an image or tells where it is."""
ABOUT = frozenset(
    """id ids uid type types kind num number count n index idx len length token tokens size sizes width height resolution score scores rating
    ratings similarity source sources origin original model version hash md5 sha256 lang language category categories format template name
    names license info meta metadata date time timestamp quality difficulty level split""".split()
)
"""Words that make of such a name one that says something about it: `prompt_tokens`, `image_id`."""
TEXTS = ("text", "txt", "content", "body", "caption", "captions", "description", "table", "document_text", "doc")
"""Fields that, beside a question of no image, hold what it is about; beside an image they may describe it."""
SPOKEN = frozenset(
    (
        "question",
        "answer",
        "role",
        "content",
        "from",
        "value",
        "user",
        "assistant",
        "caption",
        "human",
        "gpt",
        "q",
        "a",
        "text",
    )
)
COLUMN_OPTION = re.compile(r"(?:(?:option|choice|opt)[_ ]?)?([a-hA-H])|(?:option|choice|opt)[_ ]?([0-9])")
"""Fields that hold one option of a multiple choice each."""
BOOKKEEPING = frozenset(
    (
        "id",
        "ids",
        "_id",
        "uid",
        "uuid",
        "guid",
        "idx",
        "index",
        "no",
        "number",
        "key",
        "__key__",
        "__url__",
        "sha256",
        "sample_id",
        "question_id",
        "questionid",
        "image_id",
        "imageid",
        "qid",
        "item_id",
        "conversation_id",
        "doc_id",
        "row_id",
        "source",
        "sources",
        "dataset",
        "dataset_name",
        "data_source",
        "origin",
        "split",
        "subset",
        "config",
        "task",
        "tasks",
        "category",
        "categories",
        "type",
        "question_type",
        "answer_type",
        "topic",
        "domain",
        "language",
        "lang",
        "license",
        "url",
        "width",
        "height",
        "size",
        "sizes",
        "image_size",
        "image_sizes",
        "image_width",
        "image_height",
        "resolution",
        "md5",
        "hash",
        "score",
        "scores",
        "similarity",
        "clip_score",
        "aesthetic_score",
        "quality",
        "difficulty",
        "confidence",
        "relevance_ratings",
        "image_correspondence_ratings",
        "visual_dependency_ratings",
        "formatting_ratings",
        "timestamp",
        "created_at",
        "date",
        "model",
        "generator",
        "annotator",
        "version",
        "metadata",
        "meta",
        "info",
        "tags",
        "num_tokens",
        "length",
        "num_turns",
        "original_width",
        "original_height",
        "exif",
        "format",
        "mode",
    )  # fmt: skip
)
"""Fields that say nothing in the conversation; they are left unread without a word."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def holds(value: object) -> bool:
    """Whether a field says anything: not null, not empty, not a NaN from a table."""
    return not (value is None or (hasattr(value, "__len__") and len(value) == 0) or value != value)


def first_of(record: Fields, keys: tuple[str, ...]) -> str | None:
    """The first of these fields that holds something."""
    return next((key for key in keys if holds(record.get(key))), None)


def image_fields(record: Fields) -> tuple[list, set[str]]:
    """(image references of a record, the fields that they are in or are named in).

    Raises:
        BadSample: two fields hold different images, so that it is not clear which is shown.
    """
    numbered = sorted((key for key in record if NUMBERED_IMAGE.fullmatch(str(key))), key=_number)
    named = [key for key in IMAGE_KEYS if key in record]
    lists = [_as_list(record[key]) for key in named if holds(record[key])]
    shown = [record[key] for key in numbered if holds(record[key])]
    lists += [shown] if shown else []
    files = [key for key in FILE_KEYS if _names_image(record.get(key))]
    if not lists and files:
        lists = [_as_list(record[files[0]])]
    kept = next((some for some in lists if not _are_names(some)), lists[0] if lists else [])
    for other in lists:
        is_name_of_it = _are_names(other) and (not _are_names(kept) or _base_names(other) == _base_names(kept))
        if other != kept and not is_name_of_it:
            raise BadSample(
                "field",
                f"the fields {[*named, *numbered][:4]} hold different images; wanted one field for what is shown",
            )
    return kept, {*named, *numbered, *files}


@dataclass(frozen=True)
class Clip:
    """A reference to a video: `source` is that of its file (a path, a `data:` URL, bytes), or a list with those of its frames."""

    source: Any


def video_fields(record: Fields) -> tuple[list[Clip], set[str]]:
    """(the clips of a record, the fields that they are in). A list of images is the frames of one clip, one of videos as many clips.

    Raises:
        BadSample: two fields hold different ones.
    """
    held = {str(key): clips_of(record[key]) for key in record if VIDEO_KEY.fullmatch(str(key)) and holds(record[key])}
    found = list(held.values())
    if any(clips != found[0] for clips in found):
        raise BadSample(
            "field", f"the fields {sorted(held)[:4]} hold different videos; wanted one field for what is shown"
        )
    return (found[0] if found else []), set(held)


def clips_of(value: object) -> list[Clip]:
    """The clips that a field or an item holds."""
    if isinstance(value, (list, tuple)) and not any(map(_is_frame, value)):
        return [Clip(list(entry) if isinstance(entry, tuple) else entry) for entry in value]
    return [Clip(list(value) if isinstance(value, tuple) else value)]


def _is_frame(entry: Any) -> bool:
    """Whether an entry of a list is a frame, and not a video: an image's name or address, or a cell that names no video."""
    if isinstance(entry, dict):  # the cell of a Hugging Face column
        return not entry.get("path") or _is_frame(entry["path"])
    return isinstance(entry, str) and bool(IMAGE_NAME.search(entry) or entry.startswith("data:image/"))


def check_media(record: Fields, has_clips: bool) -> None:
    """Whether all that a record shows are images and videos.

    Raises:
        BadSample: it has a sound or other medium, which its conversation would ask about without showing it.
    """
    for key, value in record.items():
        is_shown = VIDEO_KEY.fullmatch(str(key)) or (has_clips and str(key).casefold().startswith("video"))
        if OTHER_MEDIA.fullmatch(str(key)) and holds(value) and not is_shown:
            raise BadSample("media", f"the field {key!r} holds {value!r:.80}; only images and videos are read")


def check_unused(record: Fields, used: set[str], said: str, where: str = "", shown: Sequence[object] = ()) -> list[str]:
    """The names of fields that are neither used nor known as bookkeeping, to be counted; what is `said` anyway is not.

    Args:
        where: "" for a record, else what part of one this is, before the names of its fields.
        shown: the record's images; a field that names one of these shows nothing more.

    Raises:
        BadSample: one of them would change what is said, shown or learned.
    """
    unread = []
    for key, value in record.items():
        name = str(key)
        if key in used or not holds(value) or name.casefold() in BOOKKEEPING:
            continue
        field = f"{where}the field {name!r}"
        if _takes_out(name.casefold(), value):
            raise BadSample("no-answer", f"{field} says that the answer is not to be learned")
        if isinstance(value, str) and re.search(rf"(?<!\w){re.escape(value.strip())}(?!\w)", said):
            continue
        if _are_turns(value):
            raise BadSample("field", f"{field} holds turns ({value!r:.80}) that would not be said")
        if _says_more(name, value, said, where, shown):
            raise BadSample("field", f"{field} holds {value!r:.80}, which would not be said; put it into the text")
        if _shows_more(name, value, where, shown):
            raise BadSample("field", f"{field} holds an image ({value!r:.60}) that would not be shown")
        if _is_media(name, value, where, shown):
            raise BadSample("media", f"{field} holds {value!r:.80}, which would not be shown or heard")
        unread.append(where + name)
    return unread


def _takes_out(name, value):
    """Whether a field says that its record or turn is not to be learned; a `label` does where it is a plain false."""
    if not isinstance(value, (bool, int, float, str)):
        return False
    said = str(value).strip().casefold()
    no, yes = said in ("false", "no", "0", "0.0"), said in ("true", "yes", "1", "1.0")
    return (name in KEPT and no) or (name in DROPPED and yes) or (name == "label" and value is False)


def _says_more(name, value, said, where, shown):
    """Whether a field says something by its name that the conversation, whose texts are `said`, does not."""
    if name.casefold() in CHANGES_THE_TEXT:
        return True
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if isinstance(value, (bool, int, float)) or (
        isinstance(value, str) and lines and all(line in value for line in lines)
    ):
        return False  # no text, or the whole conversation once more, as one text
    if where:
        return _has(name, SAYING) or name.casefold() in SPOKEN
    return _has(name, SAYING) or (name.casefold() in TEXTS and not shown)


def _shows_more(name, value, where, shown):
    """Whether a field holds an image that is not `shown`, or tells where one is while none is shown."""
    values = _as_list(value)
    if _is_image(value):
        return not (_are_names(values) and set(_base_names(values)) <= set(_base_names(shown)))
    texts = [entry for entry in values if isinstance(entry, str)]
    is_address = any("://" in text and IMAGE_NAME.search(text.partition("?")[0]) for text in texts)
    is_named = _has(name, SHOWING) and not isinstance(value, (bool, int, float))
    return not shown and (is_named or is_address)


def _is_media(name, value, where, shown):
    """Whether a field holds a film, a sound or a document; beside an image one of that name may be where it came from."""
    if where and OTHER_MEDIA.fullmatch(name):
        return True
    return not shown and any(isinstance(entry, str) and MEDIA_NAME.search(entry) for entry in _as_list(value))


def _has(name, words):
    """Whether a field's name has one of `words`, and none that makes it a remark about it."""
    found = {word.casefold() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    return bool(found & words) and not found & ABOUT


def _is_image(value: Any) -> bool:
    """Whether a field holds one or more images, or the names of local image files."""
    values = _as_list(value)
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), (bytes, bytearray)) or _names_image(value.get("path"))
    if any(isinstance(entry, dict) for entry in values):
        return any(_is_image(entry) for entry in values if isinstance(entry, dict))
    is_data = any(
        isinstance(entry, str) and (entry.startswith("data:image/") or BASE64_IMAGE.match(entry)) for entry in values
    )
    is_local = _names_image(value) and not any("://" in entry for entry in values)  # an address is where it came from
    return is_data or is_local or any(isinstance(entry, (bytes, bytearray)) for entry in values)


def _are_turns(value: Any) -> bool:
    """Whether a field holds a conversation or pairs of question and answer."""
    entries = [entry for entry in _as_list(value) if isinstance(entry, dict)]
    return any(len(SPOKEN & entry.keys()) >= 2 for entry in entries)


def weight_of(fields: Fields, role: str) -> int:
    """1 for what is learned, 0 for a turn that `weight`, `loss` or `train` takes out.

    Raises:
        BadSample: another weight, or a turn that is not the assistant's and is to be learned.
    """
    weights = []
    for key in (*WEIGHTS, *UNLEARNED):
        value = fields.get(key)
        if value is None:
            continue
        if key in UNLEARNED and isinstance(value, (bool, int)):
            if not value:
                continue  # says nothing that is not so anyway
            value = 0
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadSample("field", f"a turn has {key}={value!r:.40}; wanted 0 or 1, true or false")
        if value and role != "assistant":
            raise BadSample("field", f"a {role} turn has {key}={value!r}; only the assistant's turns are learned")
        weights.append(int(value))
    if len(set(weights)) > 1:
        raise BadSample("field", "a turn has both a weight of 0 and one of 1")
    return weights[0] if weights else 1


def as_answer(value: object) -> tuple[object, tuple[str, ...]]:
    """An answer as text and the repairs: a number is written out; of several answers the first counts.

    Raises:
        BadSample: true, false or no number, of which the text is not clear.
    """
    repairs: tuple[str, ...] = ()
    if isinstance(value, (list, tuple)) and value and all(isinstance(entry, (str, int, float)) for entry in value):
        repairs = ("first-answer",) if any(entry != value[0] for entry in value) else ()
        value = value[0]
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise BadSample("message", f"an answer is {value!r}; wanted a text or a number")
    if isinstance(value, (int, float)):
        return json.dumps(value), (*repairs, "number-as-text")
    return value, repairs


def with_options(question: object, options: object, answer: object) -> tuple[str, str]:
    """A multiple choice as question and answer: the options are written under the question, lettered.

    Raises:
        BadSample: options that are no list of texts, or an answer that is none of them and no letter of them.
    """
    if isinstance(options, dict) and [str(key).upper() for key in options] == list(LETTERS[: len(options)]):
        options = list(options.values())
    if not isinstance(options, (list, tuple)) or not all(isinstance(option, (str, int, float)) for option in options):
        raise BadSample("field", f"the options are {options!r:.80}; wanted a list of texts")
    texts = [str(option) for option in options]
    letters = [f"{letter}. {text}" for letter, text in zip(LETTERS, texts)]
    if not isinstance(question, str) or not isinstance(answer, str) or len(texts) > len(LETTERS):
        raise BadSample("field", f"the answer is {answer!r:.40} of {len(texts)} options; wanted its text or letter")
    plain = answer.strip().rstrip(".").strip("()")
    if answer not in texts and answer not in letters and plain not in LETTERS[: len(texts)]:
        raise BadSample("field", f"the answer {answer!r:.80} is none of the {len(texts)} options and no letter of them")
    if all(text in question for text in texts):
        return question, answer
    return "\n".join([question, *letters]), answer


def column_options(record: Fields) -> tuple[list, set[str]]:
    """(options of a multiple choice that has one field for each, the fields), in the order of their letters or numbers.

    Single letters count where `A` and `B` are there. Options that are empty, as tables pad them, are left out.
    """
    found = {str(match[1] or match[2]).upper(): key for key in record if (match := COLUMN_OPTION.fullmatch(str(key)))}
    names = sorted(found)
    if len(names) < 2 or names[:2] not in (["A", "B"], ["0", "1"], ["1", "2"]):
        return [], set()
    return [record[found[name]] for name in names if holds(record[found[name]])], set(found.values())


def _names_image(value: Any) -> bool:
    names = _as_list(value)
    return bool(names) and all(isinstance(name, str) and IMAGE_NAME.search(name) for name in names)


def _are_names(references: list) -> bool:
    """Whether these are paths rather than images."""
    return all(isinstance(entry, str) and not entry.startswith("data:") and len(entry) < 4096 for entry in references)


def _base_names(references: Sequence[object]) -> list[str]:
    return [str(entry).replace("\\", "/").rsplit("/", 1)[-1] for entry in references]


def _number(key: str) -> int:
    found = NUMBERED_IMAGE.fullmatch(key)
    return int(found[1]) if found else 0


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]
