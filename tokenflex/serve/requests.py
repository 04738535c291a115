"""A chat request as it comes (untrusted bytes) -> what the model is asked, or one line that says what is wrong with it."""

import base64
import binascii
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..data.images import verify_image
from ..data.problems import BadSample, Limits
from ..infer import Count
from ..model.router import AUTO
from .limits import RequestRefused, ServeLimits

FETCH_TIMEOUT_S = 10
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
}
"""Fields of OpenAI's request that are not done here, and the values that ask for nothing."""
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Url(_Strict):
    url: str


class _ImageUrl(_Url):
    detail: str | None = None  # how large OpenAI shall look at it: `num_visual_tokens` says it here


class _Image(_Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl


class _Video(_Strict):
    type: Literal["video_url"]
    video_url: _Url


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[_Text | _Image | _Video, Field(discriminator="type")]] = Field(min_length=1)
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_items(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(_Strict):
    model: str
    messages: list[_Message] = Field(min_length=1)
    num_visual_tokens: Any = None
    total_visual_tokens: int | None = Field(None, ge=0)
    effort: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """messages: as the processor takes them, images as encoded bytes that have been read whole, videos as bytes that nobody
    has looked at. num_visual_tokens: as the processor takes it, a list with one per image or video, or "auto" with its effort.
    total_visual_tokens: as the processor takes it. temperature: 0 is the likeliest answer. stop: texts that end it."""

    messages: list[dict[str, Any]]
    num_visual_tokens: Count | list[Count] | None
    total_visual_tokens: int | None = None
    effort: float | None = None
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    is_stream: bool
    has_usage: bool


def parse_request(data: bytes, model_name: str, limits: ServeLimits, hosts: Sequence[str]) -> ChatRequest:
    """The request of a body in JSON. `hosts` are those that images and videos may be fetched from (`*` is any); most often there
    are none.

    Raises:
        RequestRefused: with what is wrong with it.
    """
    try:
        return _parsed(_body(data), model_name, limits, hosts)
    except RecursionError:
        raise RequestRefused("the body is nested too deeply") from None


def _parsed(body: _Body, model_name: str, limits: ServeLimits, hosts: Sequence[str]) -> ChatRequest:
    if body.model != model_name:
        raise RequestRefused(
            f"model: {body.model!r} is not served here; {model_name!r} is", 404, "model", "model_not_found"
        )
    if body.messages[-1].role != "user":
        raise RequestRefused(
            "messages: the last one must be the user's, which is what gets an answer", param="messages"
        )
    num_images = sum(not isinstance(item, _Text) for message in body.messages for item in message.content)
    if num_images > limits.max_images:
        raise RequestRefused(
            f"messages: {num_images} images and videos; at most {limits.max_images} are taken", param="messages"
        )
    counts = counts_of(body.num_visual_tokens, num_images, limits.max_prompt_tokens)
    _check_total(body.total_visual_tokens, counts, limits.max_prompt_tokens)
    return ChatRequest(
        messages=[
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": [
                    _item(item, f"messages[{at}].content[{number}]", message.role, limits, hosts)
                    for number, item in enumerate(message.content)
                ],
            }
            for at, message in enumerate(body.messages)
        ],
        num_visual_tokens=counts,
        total_visual_tokens=body.total_visual_tokens,
        effort=body.effort,
        max_new_tokens=_max_new_tokens(body, limits),
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=_stop(body.stop),
        is_stream=bool(body.stream),
        has_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def counts_of(value: Any, num_images: int, max_tokens: int) -> Count | list[Count] | None:
    """`num_visual_tokens` of a request: "auto", a number, [rows, columns], or a list with one of either per image or video.

    A list of as many entries as images and videos is one for each, a video's for each of its frames; so [8, 12] beside two
    images is 8 for one and 12 for the other, and rows and columns of both are [[8, 12], [8, 12]].

    Raises:
        RequestRefused: anything else, or a count above `max_tokens`.
    """
    if value is None:
        return None
    if value == "auto":
        return "auto"
    is_pair = isinstance(value, list) and len(value) == 2 and all(isinstance(entry, int) for entry in value)
    if not isinstance(value, list) or (is_pair and num_images != 2):
        return _count(value, value, max_tokens)
    if len(value) != num_images:
        raise _wrong_counts(value, f"{len(value)} entries for {num_images} images and videos; give one for each")
    return [_count(entry, value, max_tokens) for entry in value]


def _count(entry: Any, value: Any, max_tokens: int) -> Count:
    sides = entry if isinstance(entry, list) and len(entry) == 2 else [entry]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        wanted = "a positive number, [rows, columns], or a list with one of either per image or video"
        raise _wrong_counts(value, f"wanted {wanted}")
    if any(side > max_tokens for side in sides) or sides[0] * sides[-1] ** (len(sides) - 1) > max_tokens:
        raise _wrong_counts(value, f"at most {max_tokens} tokens fit a prompt")
    return entry if isinstance(entry, int) else (sides[0], sides[1])


def _wrong_counts(value: Any, why: str) -> RequestRefused:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return RequestRefused(f"num_visual_tokens: {shown}: {why}", param="num_visual_tokens")


def _check_total(total: int | None, counts: Count | list[Count] | None, max_tokens: int) -> None:
    """See that a total may be kept: the processor shares it, or with "auto" the router, and neither where counts are named."""
    if not total:  # 0 lifts the total that the model was trained at
        return
    if total > max_tokens:
        raise _wrong_total(f"{total}: at most {max_tokens} tokens fit a prompt")
    if counts not in (None, AUTO):
        raise _wrong_total(
            f'{total} came with num_visual_tokens, which says what each image gets; give one of both, or "auto" beside a total'
        )


def _wrong_total(why: str) -> RequestRefused:
    return RequestRefused(f"total_visual_tokens: {why}", param="total_visual_tokens")


def _body(data: bytes) -> _Body:
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise RequestRefused(f"the body is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RequestRefused("the body is no JSON object")
    if b"\\u" in data:  # an escape may be half of a character, which neither tokenizers nor answers can hold
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RequestRefused("the body holds half of a character (a lone surrogate)") from None
    for name, neutral in NEUTRAL.items():
        value = fields.pop(name, None)
        if value is not None and value not in neutral:
            raise RequestRefused(f"{name}: is not done here; leave it out", param=name, code="unsupported_parameter")
    for name in IGNORED:
        fields.pop(name, None)
    try:
        return _Body.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, problem["loc"]))
        what = "unknown field" if problem["type"] == "extra_forbidden" else problem["msg"]
        raise RequestRefused(f"{where}: {what}", param=where) from None


def _max_new_tokens(body: _Body, limits: ServeLimits) -> int:
    wanted = body.max_completion_tokens or body.max_tokens or limits.max_new_tokens
    if wanted > limits.max_new_tokens:
        raise RequestRefused(f"max_tokens: {wanted}; at most {limits.max_new_tokens} are written", param="max_tokens")
    return wanted


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(texts) > 4 or not all(0 < len(text) <= 256 for text in texts):
        raise RequestRefused("stop: wanted at most 4 texts of 1 to 256 characters", param="stop")
    return texts


def _item(
    item: _Text | _Image | _Video, where: str, role: str, limits: ServeLimits, hosts: Sequence[str]
) -> dict[str, Any]:
    if isinstance(item, _Text):
        return {"type": "text", "text": item.text}
    if role != "user":
        raise RequestRefused(
            f"{where}: an image or a video in a message of role {role}; they belong to the user's", param=where
        )
    if isinstance(item, _Video):
        return {"type": "video", "video": _bytes_of(item.video_url.url, "video", where, limits, hosts)}
    data = _bytes_of(item.image_url.url, "image", where, limits, hosts)
    try:
        verify_image(data, Limits(max_image_pixels=limits.max_image_pixels))
    except BadSample as problem:
        detail = problem.detail.partition(";")[0]  # what to do about a shard is nothing to whoever sent this
        raise RequestRefused(f"{where}.image_url: {detail}", param=where, code="invalid_image") from None
    return {"type": "image", "image": data}


def _bytes_of(url: str, kind: str, where: str, limits: ServeLimits, hosts: Sequence[str]) -> bytes:
    """What an item's URL holds or names; `kind` is `image` or `video`."""
    return _embedded(url, kind, where) if url.startswith("data:") else _fetched(url, kind, where, limits, hosts)


def _embedded(url: str, kind: str, where: str) -> bytes:
    head, _, content = url.partition(",")
    if not head.endswith(";base64"):
        raise RequestRefused(f"{where}.{kind}_url: a data: URL must be data:{kind}/...;base64,...", param=where)
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestRefused(f"{where}.{kind}_url: no base64 ({error})", param=where, code=f"invalid_{kind}") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A host that may be asked must not send on to one that may not."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _fetched(url: str, kind: str, where: str, limits: ServeLimits, hosts: Sequence[str]) -> bytes:
    try:
        parts = urlsplit(url)
        scheme, host = parts.scheme, parts.hostname or ""
    except ValueError:
        scheme, host = "", ""
    if scheme not in ("http", "https") or not ("*" in hosts or host in hosts):
        raise RequestRefused(
            f"{where}.{kind}_url: only data: URLs are taken and nothing was fetched; send the {kind} itself"
            + (f" ({kind}s may come from {', '.join(hosts)})" if hosts else ""),
            param=where,
            code="url_not_allowed",
        )
    opener = urllib.request.OpenerDirector()  # http and https alone: no files, no ftp, no redirects
    for handler in (
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _NoRedirects(),
    ):
        opener.add_handler(handler)
    try:
        with opener.open(url, timeout=FETCH_TIMEOUT_S) as answer:
            data: bytes = answer.read(limits.max_body_bytes + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise RequestRefused(f"{where}.{kind}_url: could not be fetched ({error})", param=where) from None
    if len(data) > limits.max_body_bytes:
        raise RequestRefused(f"{where}.{kind}_url: more than {limits.max_body_bytes} bytes", 413, where)
    return data
