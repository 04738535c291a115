"""The page: samples as they will be trained, coloured by what is learned, and the statistics; self-contained HTML.

Every piece of the data is escaped and the page forbids itself scripts and the network (its Content-Security-Policy), so a
hostile sample is only text.
"""

import base64
from collections.abc import Iterator, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.images import thumbnail_jpeg
from ...data.sample import Sample
from ...errors import UserError
from .plots import bars, histogram, scatter
from .survey import Survey, Surveyed

if TYPE_CHECKING:
    from ...model import TokenFlexProcessor

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { --ink:#1d2430; --soft:#667085; --line:#e3e7ee; --paper:#ffffff; --ground:#f5f7fa; --learned:#c9efd4; --learned-ink:#0b4f24;
  --context:#eef1f6; --image:#dbe7ff; --image-ink:#173a86; --bar:#3b6fd4; --bad:#b42318; }
* { box-sizing:border-box } body { margin:0; background:var(--ground); color:var(--ink); font:15px/1.5 system-ui,sans-serif }
main { max-width:1180px; margin:0 auto; padding:28px 20px 60px } h1 { font-size:24px; margin:0 0 4px } h2 { font-size:18px; margin:34px 0 10px }
p.lead { color:var(--soft); margin:0 0 14px } .cards { display:flex; flex-wrap:wrap; gap:10px }
.card { background:var(--paper); border:1px solid var(--line); border-radius:8px; padding:8px 14px } .card b { display:block; font-size:19px }
.card span { color:var(--soft); font-size:13px } .grid { display:grid; grid-template-columns:repeat(auto-fill,minmax(340px,1fr)); gap:12px }
figure { margin:0; background:var(--paper); border:1px solid var(--line); border-radius:8px; padding:10px 12px }
figcaption { font-weight:600; font-size:14px; margin-bottom:4px } svg { width:100%; height:auto; display:block }
.bar,.dot { fill:var(--bar) } .dot { opacity:.55 } line.grid { stroke:var(--line) } .tick,.axis { fill:var(--soft); color:var(--soft); font-size:11px }
.row { display:flex; align-items:center; gap:8px; font-size:13px; margin:3px 0 } .row .name { width:38%; overflow-wrap:anywhere }
.track { flex:1; background:var(--context); border-radius:3px } .fill { display:block; height:12px; border-radius:3px; background:var(--bar) }
.value { width:56px; text-align:right; font-variant-numeric:tabular-nums } article { background:var(--paper); border:1px solid var(--line);
  border-radius:8px; padding:14px 16px; margin:0 0 14px } article header { display:flex; flex-wrap:wrap; gap:6px 14px; font-size:13px; color:var(--soft) }
article header b { color:var(--ink); font-size:15px } .body { display:flex; flex-wrap:wrap; gap:14px; margin-top:10px } .pictures { display:flex; flex-wrap:wrap; gap:8px; max-width:340px }
.pictures div { font-size:12px; color:var(--soft) } .pictures img { display:block; max-width:320px; max-height:240px; border:1px solid var(--line); border-radius:4px }
.text { flex:1; min-width:300px; white-space:pre-wrap; overflow-wrap:anywhere; font:13.5px/1.75 ui-monospace,Menlo,Consolas,monospace }
.text span { border-radius:3px; padding:1px 0 } .learned { background:var(--learned); color:var(--learned-ink) } .context { background:var(--context) }
.image { background:var(--image); color:var(--image-ink); padding:1px 6px } .legend span { padding:2px 8px; border-radius:4px; font-size:13px; margin-right:6px }
table { border-collapse:collapse; font-size:13px; background:var(--paper) } td,th { border:1px solid var(--line); padding:3px 10px; text-align:right }
td:first-child,th:first-child,.left td,.left th { text-align:left } .left td { overflow-wrap:anywhere } .bad { color:var(--bad) } .chip { background:var(--context); border-radius:10px; padding:0 8px }
"""


def write_page(
    path: str | PathLike,
    survey: Survey,
    shards: Sequence[Path],
    processor: "TokenFlexProcessor | None",
    counts: Sequence[int],
) -> None:
    """Write the page of `render_page` to a file.

    Raises:
        UserError: the file cannot be written.
    """
    page = render_page(survey, shards, processor, counts)
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; name a file that can be written") from None


def render_page(
    survey: Survey,
    shards: Sequence[Path],
    processor: "TokenFlexProcessor | None" = None,
    counts: Sequence[int] = (),
) -> str:
    """The HTML of a `Survey`. With a processor, texts are shown as tokens with their mask, and costs at each of `counts`."""
    counted = survey.tally.num_samples
    some = f"{counted:,} of {survey.num_held:,} samples counted" if survey.num_held > counted else f"{counted} samples"
    title = f"{len(shards)} shard{'s' * (len(shards) > 1)}, {some}"
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style></head><body><main>',
        f"<h1>{escape(title)}</h1><p class='lead'>{escape(str(shards[0]))}{' and others' if len(shards) > 1 else ''}</p>",
        _cards(survey, processor),
        "<h2>Statistics</h2>",
        _costs(survey, counts) if processor else "",
        f'<div class="grid">{"".join(_plots(survey, processor, counts))}</div>',
        "<h2>Samples</h2>",
        _legend() if processor else "<p class='lead'>Give --config or --model to see tokens and masks.</p>",
        *(_article(surveyed, processor, counts) for surveyed in survey.shown),
        _problems(survey),
        "</main></body></html>\n",
    ]
    return "".join(parts)


def _cards(survey: Survey, processor: "TokenFlexProcessor | None") -> str:
    tally = survey.tally
    figures: list[tuple[int | str, str]] = [
        (tally.num_good, "good samples"),
        (tally.num_skipped, "bad samples"),
        (tally.num_repaired, "repaired"),
        (sum(survey.images), "images"),
        (sum(number == 0 for number in survey.images), "text-only samples"),
    ]
    if processor:
        text, learned = sum(survey.text), sum(survey.learned)
        figures += [(text, "text tokens"), (f"{100 * learned / max(text, 1):.1f} %", "of them learned")]
    cards = "".join(f'<div class="card"><b>{_figure(value)}</b><span>{name}</span></div>' for value, name in figures)
    return f'<div class="cards">{cards}</div>'


def _costs(survey: Survey, counts: Sequence[int]) -> str:
    text, tiles = np.array(survey.text), np.array(survey.tiles)
    rows = []
    for count in counts:
        total = text + tiles * count
        visual = tiles.sum() * count / max(total.sum(), 1)
        cells = (
            count,
            int(total.sum()),
            f"{100 * visual:.1f} %",
            f"{total.mean():.0f}",
            int(np.percentile(total, 99)),
            int(total.max()),
        )
        rows.append("<tr>" + "".join(f"<td>{_figure(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(
        f"<th>{name}</th>"
        for name in ("visual tokens per tile", "tokens in all", "visual", "mean length", "99 %", "longest")
    )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table><p></p>"


def _plots(survey: Survey, processor: "TokenFlexProcessor | None", counts: Sequence[int]) -> Iterator[str]:
    unit = "tokens" if processor else "characters"
    yield histogram(survey.text, "Text length", unit, is_log=True)
    if processor:
        yield histogram(survey.learned, "Learned tokens", "tokens", is_log=True)
        if counts:
            total = np.array(survey.text) + np.array(survey.tiles) * max(counts)
            yield histogram(total, f"Length at {max(counts)} visual tokens per tile", "tokens")
        yield histogram(survey.tiles, "Tiles per sample", "tiles")
    yield histogram(survey.images, "Images per sample", "images")
    yield histogram(survey.turns, "Messages per sample", "messages")
    yield scatter(survey.sizes, "Image sizes")
    yield bars(survey.sources, "Source or task", "samples")


def _problems(survey: Survey) -> str:
    tally = survey.tally
    if not tally.num_skipped and not tally.repairs:
        return ""
    listed = "".join(
        f"<tr><td>{escape(p.shard)}</td><td>{escape(p.key or '-')}</td><td>{p.offset}</td><td class='bad'>{p.reason}</td><td>{escape(p.detail[:200])}</td></tr>"
        for p in survey.problems[:200]
    )
    table = (
        f"<table><tr><th>shard</th><th>key</th><th>byte</th><th>reason</th><th>detail</th></tr>{listed}</table>"
        if listed
        else ""
    )
    plots = bars(tally.skipped, "Bad samples", "by reason") if tally.skipped else ""
    plots += bars(tally.repairs, "Repairs", "by kind") if tally.repairs else ""
    return f'<h2>Bad and repaired</h2><div class="grid">{plots}</div><p></p>{table}'


def _legend() -> str:
    return (
        '<p class="legend"><span class="learned">learned</span><span class="context">context, not learned</span>'
        '<span class="image">image: tiles x visual tokens</span></p>'
    )


def _article(surveyed: Surveyed, processor: "TokenFlexProcessor | None", counts: Sequence[int]) -> str:
    sample = surveyed.sample
    facts = [f"{len(sample.messages)} messages", f"{len(sample.images)} images"]
    if processor:
        tiles = sum(surveyed.tiles)
        costs = ", ".join(f"{count}: {surveyed.num_text + tiles * count}" for count in counts)
        facts += [f"{surveyed.num_text} text tokens, {surveyed.num_learned} learned", f"{tiles} tiles"]
        facts += [f"tokens at {costs}"] if costs else []
    facts += [name for name in (sample.source, sample.task) if name]
    chips = "".join(f'<span class="chip">{escape(name)}</span>' for name in surveyed.repairs)
    head = f"<b>{escape(sample.key)}</b>" + "".join(f"<span>{escape(fact)}</span>" for fact in facts) + chips
    pictures = "".join(_picture(*entry) for entry in zip(sample.images, surveyed.sizes, surveyed.tiles))
    pictures = f'<div class="pictures">{pictures}</div>' if pictures else ""
    text = _tokens(sample, surveyed, processor, counts) if processor else _plain(sample)
    return f'<article><header>{head}</header><div class="body">{pictures}<div class="text">{text}</div></div></article>'


def _picture(data: bytes, size: tuple[int, int], tiles: int) -> str:
    encoded = base64.b64encode(thumbnail_jpeg(data)).decode()
    name = f"{size[0]} x {size[1]}, {tiles} tile{'s' * (tiles > 1)}"
    return f'<div><img alt="" src="data:image/jpeg;base64,{encoded}">{name}</div>'


def _tokens(sample: Sample, surveyed: Surveyed, processor: "TokenFlexProcessor", counts: Sequence[int]) -> str:
    """The whole rendered conversation: stretches of learned and other tokens, an image as one box."""
    encoded = processor.encode(sample.messages, [1] * len(sample.images))
    places = dict(zip(encoded.image_starts, range(len(sample.images))))
    spans, begin = [], 0
    for place in range(len(encoded.input_ids) + 1):
        is_end = place == len(encoded.input_ids)
        if is_end or place in places or encoded.is_target[place] != encoded.is_target[begin]:
            spans.append(_stretch(encoded, begin, place, processor))
            begin = place
        if place in places:
            tiles = surveyed.tiles[places[place]]
            cost = " | ".join(str(tiles * count) for count in counts)
            spans.append(
                f'<span class="image">image {places[place] + 1}: {tiles} x {" | ".join(map(str, counts))} = {cost}</span>'
            )
            begin = place + 1
    return "".join(spans)


def _stretch(encoded: Any, begin: int, end: int, processor: "TokenFlexProcessor") -> str:
    if end <= begin:
        return ""
    is_target = encoded.is_target[begin]
    text = processor.tokenizer.decode(encoded.input_ids[begin:end], skip_special_tokens=False)
    name = f"{end - begin} tokens, {'learned' if is_target else 'not learned'}"
    return f'<span class="{"learned" if is_target else "context"}" title="{name}">{escape(text)}</span>'


def _plain(sample: Sample) -> str:
    spans = []
    for message in sample.messages:
        spans.append(f'<span class="context">{escape(message["role"])}: </span>')
        spans += [
            escape(item["text"]) if item["type"] == "text" else '<span class="image">image</span>'
            for item in message["content"]
        ]
        spans.append("\n")
    return "".join(spans)


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, np.integer)) else escape(str(value))
