"""What can be wrong with a sample, in one closed list: the same names in training, `validate`, `convert` and `inspect`.

A `BadSample` is skipped (its place in a pack is filled with tokens that teach nothing), never drawn again. A repair is an
oddity that reading puts right by a fixed rule; it is counted too, so that injected = skipped + repaired can be checked.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..errors import UserError

REASONS = {
    "tar-damaged": "the tar is truncated, or a header in it is broken",
    "tar-empty": "the shard holds no sample",
    "member-type": "a link, folder or device, or an extension that is not on the allow-list",
    "member-name": "an absolute path, `..`, no extension, or bytes that are not UTF-8",
    "member-size": "a member larger than the limit",
    "member-twice": "the same member comes twice",
    "key-twice": "the key has already come: a duplicate, or members of samples that are interleaved",
    "no-json": "there is no .json member",
    "json": "the JSON is broken, not UTF-8, nested too deeply, or not an object with messages",
    "message": "a message of an unknown role, or content that is neither text nor a list of text and image items",
    "template": "the chat template does not write the conversation as it is, or no answer where one is asked for",
    "field": "a field that changes what is said or shown, and cannot be used",
    "media": "a sound or another medium that is neither image nor video",
    "image-tags": "not one image per image tag",
    "image-missing": "the image file is not there",
    "image-path": "an absolute path, a path with `..`, or a URL of a scheme that is not on the allow-list",
    "image-number": "images are not numbered 0, 1, 2, ...",
    "image-format": "not a JPEG, PNG or WebP image",
    "image-pixels": "the header announces more pixels than the limit, or none",
    "image-data": "the image is truncated or its data is broken",
    "clip": "a clip that is empty, has too many frames, or does not decode",
    "no-answer": "no assistant text to learn from",
    "length": "the sample has not the length that the index says",
    "duplicate": "the same record once more",
}
"""Why a sample is skipped."""

REPAIRS = {
    "exif-rotated": "turned upright as its EXIF orientation says",
    "alpha": "laid on white",
    "palette": "a palette image, expanded",
    "cmyk": "CMYK or another colour space, converted to RGB",
    "16-bit": "16-bit or floating-point samples, scaled to 8 bits",
    "grey": "a grey or one-bit image, expanded",
    "animated": "an animated image, of which the first frame is taken",
    "extreme-shape": "a side under 4 pixels, or one more than 50 times the other",
    "jpeg-warning": "JPEG data with flaws that the decoder can read past",
    "special-text": "text that spells a special token; it stays text",
    "transcoded": "an image of another format, written as PNG",
    "tag-added": "an image without a tag: the tag is put before the first question",
    "tag-as-text": "an image tag in a conversation without images: it stays text",
    "answer-first-dropped": "answers before the first question, left out",
    "turns-joined": "several messages of one role in a row, joined",
    "number-as-text": "an answer that is a number, written out",
    "first-answer": "several answers, of which the first is taken",
    "id-shared": "another record has the same id and other content; both are kept",
}
"""What is put right, and how."""


class BadSample(UserError):
    """A sample that cannot be used.

    Args:
        reason: one of `REASONS`.
        shard, key, offset: where; offset in bytes from the shard's begin, -1 where it is not known.
        detail: what came, what was wanted.
    """

    def __init__(self, reason: str, detail: str, shard: object = "", key: object = "", offset: int = -1):
        assert reason in REASONS, reason
        self.reason, self.detail, self.shard, self.key, self.offset = reason, detail, str(shard), str(key), int(offset)
        super().__init__(reason, detail, shard, key, offset)

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.shard, self.key and f"sample {self.key}") if part)
        return f"{where}: {self.detail}" if where else self.detail

    def located(self, shard: object, key: object, offset: int = -1) -> "BadSample":
        """The same problem with its place filled in where it was not known."""
        offset = self.offset if self.offset >= 0 else offset
        return BadSample(self.reason, self.detail, self.shard or shard, self.key or key, offset)

    def record(self) -> dict[str, Any]:
        """The problem as a dict for a JSON log."""
        names = ("shard", "key", "offset", "reason", "detail")
        return {name: getattr(self, name) for name in names}


class HasLimits(Protocol):
    """A configuration's data section, or a command's arguments."""

    @property
    def max_member_bytes(self) -> int:
        """See `Limits`."""

    @property
    def max_image_pixels(self) -> int:
        """See `Limits`."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What of a shard may be read, and what a sample may cost before it is read or decoded."""

    max_member_bytes: int = 64 * 2**20
    """Bytes of one file in a shard."""
    max_image_pixels: int = 100_000_000
    """Pixels of one image, by its header."""
    extensions: str = r"json|([^.]+\.)?(jpg|jpeg|png|webp|mp4|webm|mkv|mov|avi)"
    """Members that are read, as a pattern of their extensions. No pickles, no arrays, no tensors: nothing whose reading
    could run code."""
    ignore_others: bool = False
    """Leave other members unread; else a sample that has one is bad."""

    @classmethod
    def of(cls, settings: HasLimits) -> "Limits":
        """The limits of whatever has them: a configuration's data section, or a command's arguments."""
        return cls(max_member_bytes=settings.max_member_bytes, max_image_pixels=settings.max_image_pixels)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Tally:
    """Samples seen, good, skipped by reason and repaired by kind; sums over shards and ranks.

    A sample is skipped or good; a good one may carry several repairs. `skipped + repaired` counts samples once each. `unread`
    counts the fields of foreign records that a conversion left unread and does not know as bookkeeping.
    """

    def __init__(self) -> None:
        self.num_samples = self.num_repaired = 0
        self.skipped: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    @property
    def num_good(self) -> int:
        return self.num_samples - self.num_skipped

    def skip(self, problem: BadSample) -> None:
        self.num_samples += 1
        self.skipped[problem.reason] += 1

    def keep(self, repairs: Iterable[str] = ()) -> None:
        self.num_samples += 1
        kinds = set(repairs)
        self.num_repaired += bool(kinds)
        self.repairs.update(kinds)

    def update(self, other: "Tally") -> None:
        self.num_samples += other.num_samples
        self.num_repaired += other.num_repaired
        self.skipped += other.skipped
        self.repairs += other.repairs
        self.unread += other.unread

    def to_json(self) -> dict[str, Any]:
        unread = {"unread": dict(self.unread.most_common())} if self.unread else {}
        return {
            **unread,
            "num_samples": self.num_samples,
            "num_good": self.num_good,
            "num_skipped": self.num_skipped,
            "num_repaired": self.num_repaired,
            "skipped": dict(self.skipped.most_common()),
            "repairs": dict(self.repairs.most_common()),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Tally":
        tally = cls()
        tally.num_samples, tally.num_repaired = record["num_samples"], record["num_repaired"]
        tally.skipped, tally.repairs = Counter(record["skipped"]), Counter(record["repairs"])
        tally.unread = Counter(record.get("unread", {}))
        return tally

    def lines(self) -> list[str]:
        """The table for a person: one line per reason and repair."""
        head = f"{self.num_samples} samples: {self.num_good} good ({self.num_repaired} of them repaired), {self.num_skipped} skipped"
        lines = [f"  skipped  {number:8d}  {name}: {REASONS[name]}" for name, number in self.skipped.most_common()]
        lines += [f"  repaired {number:8d}  {name}: {REPAIRS[name]}" for name, number in self.repairs.most_common()]
        lines += [f"  unread   {number:8d}  the field {name!r}" for name, number in self.unread.most_common(20)]
        return [head, *lines]
