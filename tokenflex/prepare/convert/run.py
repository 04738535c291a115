"""A whole conversion: parts over processes, one shard each, taken up again where it stopped, and a report of every record."""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset

from ...data.problems import BadSample, Limits, Tally
from ...errors import UserError
from ...files import over_processes, write_whole
from ..clips import checked_video
from .fields import Clip
from .images import checked_image, fetch_image
from .records import convert_record
from .sources import AnyPart, csv_records, json_parts, parquet_parts, read_parts, shard_parts

VERSION = 4  # of the rules by which records are read: shards of two versions do not mix
FORMATS: dict[str, Callable[..., Iterator[AnyPart]]] = {
    "llava": json_parts,
    "openai": json_parts,
    "huggingface": parquet_parts,
    "webdataset": shard_parts,
    "csv": functools.partial(read_parts, read=csv_records),
}
"""Format -> how it is cut into parts. LLaVA and OpenAI files differ in their records only, which tell themselves apart."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the written samples depend on beside the records."""

    limits: Limits
    """What is read at most."""
    caption_prompt: str = "Describe the image."
    """The question of a record that has a caption only."""
    source_name: str = ""
    """Written into every sample as `source`."""
    tool_turns: str = "skip"
    """Records in which functions are called: `skip` them, or take calls and results as `text` with their role."""
    split: str = ""
    """Which split of a Hugging Face folder that holds several, or `all`."""
    subset: str = ""
    """Which configuration of a Hugging Face folder that holds several, or `all`."""


def convert(
    format: str,
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    options: Options,
    images: str | os.PathLike | None = None,
    samples_per_shard: int = 1000,
    num_workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> Tally:
    """Convert a data set into shards `out/shard-00000.tar`, ...; returns the `Tally` of all records.

    Done parts are kept and not done again, so the same call goes on where it was stopped. `out/report.json` has the
    counts, `out/skipped.jsonl` a line per skipped record. `progress(number)` is told of finished records.

    Raises:
        UserError: no such source, an output folder of something else, a full disk, or a worker that died.
    """
    chosen = {"split": options.split, "subset": options.subset} if format == "huggingface" else {}
    parts = list(FORMATS[format](source, images and str(images), samples_per_shard, **chosen))
    out = Path(out).expanduser()
    _prepare(out, [str(source), format, samples_per_shard, repr(options)])
    jobs = [(number, part) for number, part in enumerate(parts)]
    work = functools.partial(_convert_part, out=out, options=options)
    reports: dict[int, dict[str, Any]] = {}
    try:
        for (number, _), report in over_processes(work, jobs, num_workers, in_order=False):
            reports[number] = report
            if progress:
                progress(report["tally"]["num_samples"])
    except KeyboardInterrupt:
        raise UserError(
            f"data convert: stopped with {len(reports)} of {len(parts)} shards done in {out}; the same command goes on from there"
        ) from None
    except BrokenProcessPool:
        raise UserError(
            f"data convert: a worker process died (out of memory?) with {len(reports)} of {len(parts)} shards done in {out}; "
            "the same command goes on from there; lower --workers"
        ) from None
    except OSError as error:
        free = shutil.disk_usage(out).free
        raise UserError(
            f"data convert: {error.filename or out}: {error.strerror} ({free / 1e9:.2f} GB are free); the same command goes on"
        ) from None
    return _finish(out, [reports[number] for number in range(len(parts))])


def _prepare(out: Path, request: list) -> None:
    """Make the output folder; refuse one that holds another conversion or foreign shards."""
    marker = out / "conversion.json"
    wanted = {
        "version": VERSION,
        "request": hashlib.sha256(repr(request).encode()).hexdigest()[:16],
        "source": request[0],
    }
    if marker.exists():
        found = json.loads(marker.read_text())
        if found != wanted:
            raise UserError(
                f"--out {out}: holds a conversion of {found['source']} with other settings; name another folder or remove this one"
            )
        return
    if out.exists() and any(out.glob("*.tar")):
        raise UserError(f"--out {out}: holds shards already; name another folder or remove them")
    (out / "parts").mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(wanted))


def _convert_part(job: tuple[int, AnyPart], out: Path, options: Options) -> dict[str, Any]:
    """Write one shard and its report, unless both are there; returns the report."""
    number, part = job
    shard, report_path = out / f"shard-{number:05d}.tar", out / "parts" / f"{number:05d}.json"
    stamp = part.fingerprint()
    if report_path.exists():
        report = json.loads(report_path.read_text())
        if report["part"] == stamp and (not report["num_bytes"] or _size(shard) == report["num_bytes"]):
            return report
    tally, skipped = Tally(), []
    temporary = shard.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        with webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
            for place, record, notes in part.records(options.limits):
                try:
                    members, repairs, unread = _sample(record, part, options)
                except BadSample as problem:
                    tally.skip(problem)
                    skipped.append({"source": part.path, "place": place, **problem.record()})
                    continue
                key = f"{number:05d}-{tally.num_good:06d}"
                tally.keep((*repairs, *notes))
                tally.unread.update(set(unread))
                # Two writes, because TarWriter sorts the members of one: a reader meets the conversation first.
                writer.write({"__key__": key, "json": members.pop("json")})
                if members:
                    writer.write({"__key__": key, **members})
        file.flush()
        os.fsync(file.fileno())
    if tally.num_good:
        temporary.rename(shard)
    else:
        temporary.unlink()
    report = {"part": stamp, "shard": shard.name, "num_bytes": _size(shard) if tally.num_good else 0}
    report = {**report, "tally": tally.to_json(), "skipped": skipped}
    write_whole(report_path, json.dumps(report))
    return report


def _sample(record: Any, part: AnyPart, options: Options) -> tuple[dict[str, bytes], tuple[str, ...], tuple[str, ...]]:
    """Members of a converted record by extension, its repairs, and the names of its fields that were not read.

    Raises:
        BadSample: the record, or an image of it, cannot be used.
    """
    if isinstance(record, BadSample):
        raise record
    converted = convert_record(record, options.caption_prompt, options.tool_turns)
    repairs = converted.repairs
    written: dict[str, Any] = {"messages": converted.messages}
    if record.get("id") is not None:
        written["id"] = str(record["id"])
    if options.source_name or record.get("source"):
        written["source"] = options.source_name or str(record["source"])
    members: dict[str, bytes] = {}
    shown = (item for message in converted.messages for item in message["content"] if item["type"] == "image")
    for item, reference in zip(shown, converted.references):
        is_file = isinstance(reference, Clip) and not isinstance(reference.source, list)
        frames = reference.source if isinstance(reference, Clip) and not is_file else [reference]
        if isinstance(reference, Clip):
            item |= {"type": "video"} if is_file else {"type": "video", "frames": len(frames)}
        if not frames:
            raise BadSample("clip", "an empty clip: it has no frame; wanted at least one")
        for frame in frames:
            if is_file:
                data, extension = checked_video(fetch_image(reference.source, part.images, options.limits))
            else:
                data, extension, more = checked_image(fetch_image(frame, part.images, options.limits), options.limits)
                repairs = (*repairs, *more)
            members[f"{len(members)}.{extension}"] = data
    return {"json": json.dumps(written, ensure_ascii=False).encode(), **members}, repairs, converted.unread


def _finish(out: Path, reports: list[dict[str, Any]]) -> Tally:
    tally = Tally()
    with open(out / "skipped.jsonl", "w", encoding="utf-8") as file:
        for report in reports:
            tally.update(Tally.from_json(report["tally"]))
            file.writelines(json.dumps(entry, ensure_ascii=True) + "\n" for entry in report["skipped"])
    shards = [report["shard"] for report in reports if report["num_bytes"]]
    (out / "report.json").write_text(json.dumps({**tally.to_json(), "shards": shards}, indent=1) + "\n")
    return tally


def first_skipped(out: str | os.PathLike) -> str:
    """What was wrong with the first record that a conversion into `out` left out, in words."""
    with open(Path(out).expanduser() / "skipped.jsonl", encoding="utf-8") as file:
        entry = json.loads(next(file, "null"))
    return f"the first, {entry['place']}: {entry['detail']}" if entry else "there was none"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
