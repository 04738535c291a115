"""What went wrong in a run, with the pictures: skipped steps, ways back, saves that failed, bad samples."""

import base64
from collections import Counter
from collections.abc import Sequence
from html import escape

from ...config import DataConfig
from ...data import Limits
from ...data.problems import REASONS
from .pictures import pictures_at, pictures_of
from .reading import Record, RunRecord
from .tables import table

MAX_SHOWN = 24
"""Bad samples that are shown with their pictures."""
MAX_SKIPS = 6
"""Skipped steps whose samples are shown."""
MAX_OF_SKIP = 8
"""Samples of one of them."""
MAX_EVENTS = 200
WORDS = {"skip": "step skipped", "roll back": "went back", "save failed": "save failed"}


def incidents(run: RunRecord, name: str) -> str:
    """Everything of it as HTML; a line where nothing was wrong."""
    events = [event for event in run.events if event.get("event") in WORDS]
    if not events and not run.bad_samples:
        return f"<p class='lead'>{escape(name)}: no step was skipped, no save failed, no sample was bad.</p>"
    limits = _limits(run)
    parts = [f"<p class='lead'>{escape(name)}</p>"]
    if events:
        rows = [[event.get("step", "-"), WORDS[event["event"]], _about(event)] for event in events[:MAX_EVENTS]]
        parts.append(table(["step", "what", "why"], rows, num_text=3))
        parts += [_skipped(event, limits) for event in events if event["event"] == "skip"][:MAX_SKIPS]
    if run.bad_samples:
        parts.append(_bad_samples(run.bad_samples, limits))
    return "".join(parts)


def _limits(run: RunRecord) -> Limits:
    """The limits that the run read its data under, or the usual ones where its recipe does not say."""
    defaults, data = DataConfig(), run.settings.get("data") or {}

    def limit(key: str) -> int:
        value = data.get(key)
        return value if isinstance(value, int) else int(getattr(defaults, key))

    return Limits(max_member_bytes=limit("max_member_bytes"), max_image_pixels=limit("max_image_pixels"))


def _about(event: Record) -> str:
    if event["event"] == "roll back":
        return f"to step {event.get('to')}; {len(event.get('passed_over') or [])} steps' data are passed over"
    return str(event.get("reason") or event.get("problem") or "")


def _skipped(event: Record, limits: Limits) -> str:
    """The samples of a skipped step, with their pictures where their shards are here."""
    samples = [str(sample) for sample in event.get("samples") or []]
    shown = samples[:MAX_OF_SKIP]
    by_shard: dict[str, list[str]] = {}
    for sample in shown:
        shard, _, key = sample.rpartition(":")
        by_shard.setdefault(shard, []).append(key)
    pictures = {shard: pictures_of(shard, keys, limits) for shard, keys in by_shard.items()}
    articles = ""
    for sample in shown:
        shard, _, key = sample.rpartition(":")
        articles += _article(key, [shard], pictures[shard].get(key, []))
    more = f", the first {len(shown)}" if len(samples) > len(shown) else ""
    head = f"Step {event.get('step')}: its {len(samples)} samples{more}"
    return f"<details open><summary>{escape(head)}</summary><div class='samples'>{articles}</div></details>"


def _bad_samples(records: Sequence[Record], limits: Limits) -> str:
    """How many for which reason, and the first of them with their pictures, each sample once."""
    reasons = Counter(record["reason"] for record in records)
    rows = [[reason, REASONS.get(reason, ""), count] for reason, count in reasons.most_common()]
    once = {(r["shard"], r["key"], r["offset"]): r for r in reversed(records)}
    firsts = sorted(once.values(), key=lambda record: record["step"])[:MAX_SHOWN]
    articles = "".join(
        _article(
            record["key"] or "key not known",
            [f"{record['reason']}: {record['detail']}", f"{record['shard']}, byte {record['offset']}"],
            pictures_at(record["shard"], record["offset"], record["key"], limits),
            f"met at step {record['step']} by rank {record['rank']}",
        )
        for record in firsts
    )
    more = f", the first {len(firsts)} shown" if len(once) > len(firsts) else ""
    head = f"<p class='lead'>Bad samples: {len(records)} met, {len(once)} different{more}. Each was filled in with tokens that teach nothing.</p>"
    return f"{head}{table(['reason', 'what it means', 'met'], rows, num_text=2)}<div class='samples'>{articles}</div>"


def _article(title: str, lines: Sequence[str], pictures: Sequence[bytes], note: str = "") -> str:
    images = "".join(
        f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(picture).decode()}">' for picture in pictures
    )
    texts = "".join(f"<p>{escape(line)}</p>" for line in (*lines, note) if line)
    none = "" if pictures else "<p>no picture of it can be shown</p>"
    return f'<div class="panel sample"><b>{escape(title)}</b>{texts}{images}{none}</div>'
