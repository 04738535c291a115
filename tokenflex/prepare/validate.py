"""Every bad sample of a set of shards, named: what `tokenflex data validate` prints, and what training would skip."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from ..data.clips import with_frames
from ..data.images import verify_image
from ..data.problems import BadSample, Limits, Tally
from ..data.sample import Sample, has_answer
from ..data.scan import scan_shard
from ..errors import UserError
from ..files import over_processes
from .clips import frames_of
from .convert.records import text_repairs


def validate(
    shards: Sequence[Path], limits: Limits, num_workers: int = 1, progress: Callable[[int], object] | None = None
) -> tuple[Tally, list[BadSample]]:
    """Read and decode every sample: (`Tally`, the `BadSample`s in the shards' order).

    A key that came in an earlier shard is bad too. `progress(number)` is told of samples as shards are done.

    Raises:
        UserError: a shard that cannot be opened.
    """
    tally = Tally()
    problems: list[BadSample] = []
    seen: dict[bytes, Path] = {}
    work = functools.partial(validate_shard, limits=limits)
    for shard, (found, bad, keys) in over_processes(work, shards, num_workers):
        tally.update(found)
        problems += bad
        if progress:
            progress(found.num_samples)
        for digest, key, offset in keys:
            first = seen.setdefault(digest, shard)
            if first is not shard:
                problem = BadSample("key-twice", f"its key has come before in {first}", shard, key, offset)
                problems.append(problem)
                tally.num_samples -= 1  # it was counted as good
                tally.skip(problem)
    return tally, problems


def validate_shard(shard: Path, limits: Limits) -> tuple[Tally, list[BadSample], list[tuple[bytes, str, int]]]:
    """(`Tally`, problems, [(digest of the key, key, offset)] of good samples) of one shard.

    Raises:
        UserError: the shard cannot be opened.
    """
    tally, problems, keys = Tally(), [], []
    try:
        for scanned in scan_shard(shard, limits):
            try:
                tally.keep(check_sample(with_frames(scanned.whole, frames_of), limits))
                digest = hashlib.blake2b(scanned.key.encode(), digest_size=12).digest()
                keys.append((digest, scanned.key, scanned.offset))
            except BadSample as problem:
                problems.append(problem.located(shard, scanned.key, scanned.offset))
                tally.skip(problem)
    except OSError as error:
        raise UserError(f"{shard}: {error.strerror}; give the path of a tar file") from None
    return tally, problems, keys


def check_sample(sample: Sample, limits: Limits) -> tuple[str, ...]:
    """Names of the repairs that a parsed sample needs, after decoding all of it.

    Raises:
        BadSample: an image that does not decode, or nothing to learn.
    """
    repairs = list(text_repairs(sample.messages))
    for i, data in enumerate(sample.images):
        try:
            repairs += verify_image(data, limits).repairs
        except BadSample as problem:
            raise BadSample(problem.reason, f"image {i}: {problem.detail}") from None
    if not has_answer(sample.messages):
        raise BadSample("no-answer", "has no assistant text to learn from")
    return tuple(dict.fromkeys(repairs))


def write_report(path: str | PathLike, tally: Tally, problems: Sequence[BadSample]) -> None:
    """JSON lines: one per bad sample, then the counts.

    Raises:
        UserError: the file cannot be written.
    """
    lines = [json.dumps(problem.record(), ensure_ascii=True) for problem in problems]
    try:
        Path(path).write_text("\n".join([*lines, json.dumps(tally.to_json())]) + "\n")
    except OSError as error:
        raise UserError(f"--report {path}: {error.strerror}; name a file that can be written") from None
