"""The questions of an evaluation, read by training's rules: a bad sample is left out, counted and named."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..data import BadSample, Limits, Sample, decode_image
from ..data.clips import FramesOf, with_frames
from ..data.shards import Shard
from ..errors import UserError
from ..model.video import clip_frames

MAX_NAMED = 10
"""Bad samples that are printed."""


@dataclass
class Questions:
    """Samples that are asked, in the shards' order, and the bad ones that are not."""

    samples: list[Sample] = field(default_factory=list)
    problems: list[BadSample] = field(default_factory=list)

    def tell(self, say: Callable[[str], None]) -> None:
        """Name the bad samples."""
        for problem in self.problems[:MAX_NAMED]:
            say(f"left out  {problem} ({problem.reason})")
        if len(self.problems) > MAX_NAMED:
            say(f"left out  {len(self.problems) - MAX_NAMED} more; tokenflex data validate names all")


def read_questions(
    shards: Sequence[Shard],
    max_per_task: int,
    limits: Limits,
    frames_of: FramesOf = clip_frames,
    *,
    tasks: Sequence[str] = (),
) -> Questions:
    """The questions of shards, at most `max_per_task` of each of `tasks`, or of every task where none is named.

    Clips become frames by `frames_of`, a processor's `frames`.

    Raises:
        UserError: a shard that cannot be read, no good question in any, or none of a task that is named.
    """
    questions, per_task = Questions(), Counter[str]()
    others: set[str] = set()
    for shard in shards:
        try:
            for scanned in shard.scan(limits):
                try:
                    sample = scanned.whole
                    _check_answer(sample)
                    if tasks and sample.task not in tasks:
                        others.add(sample.task)
                    elif per_task[sample.task] < max_per_task:
                        sample = with_frames(sample, frames_of)
                        _check_images(sample, limits)
                        per_task[sample.task] += 1
                        questions.samples.append(sample)
                except BadSample as problem:
                    questions.problems.append(problem.located(shard, scanned.key, scanned.offset))
        except OSError as error:
            raise UserError(f"{shard}: {error.strerror}; give the path of a tar file") from None
    missing = [task for task in tasks if task not in per_task]
    if missing and (others or per_task):
        raise UserError(
            f"evaluate.tasks: no good question of task {missing[0]!r}; there are {', '.join(sorted({*others, *per_task}))}"
        )
    if not questions.samples:
        raise UserError(
            f"data.evaluation: of {len(questions.problems)} samples in {len(shards)} shards none is good; "
            "see tokenflex data validate"
        )
    return questions


def _check_answer(sample: Sample) -> None:
    role = sample.messages[-1]["role"]
    if role != "assistant":
        raise BadSample("no-answer", f"ends with a {role} message; wanted the expected answer")


def _check_images(sample: Sample, limits: Limits) -> None:
    for number, image in enumerate(sample.images):
        decode_image(image, f"image {number}", limits)
