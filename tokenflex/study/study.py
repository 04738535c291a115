"""A study from its recipe to its page: what `launch/paper.py` does."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import load_config
from ..corpus import resolve_embedded
from ..errors import UserError
from ..files import write_whole
from ..model.build import vision_config
from ..model.vision import patch_grid
from .arms import Arm, chosen, core_arms, further_arms
from .jobs import Job, Runs, Say, Workers, jobs_of
from .record import MadeBy, Record, protocol_version
from .report import PLOTS, TABLES, Findings, filled, plot_differences
from .shards import without_images
from .times import measure

TIMED_STEPS = 60
"""Of a run that is timed; the first ten are not."""
TOGETHER = "together"
"""What stands in the page's comments for two records read as one."""


@dataclass(frozen=True)
class Study:
    """A study that is open.

    runs: its recipe and where its runs lie. results: the record's file. record: what is known so far.
    """

    runs: Runs
    results: Path
    record: Record

    @property
    def all_arms(self) -> list[Arm]:
        """Every arm of the protocol."""
        model = self.runs.base.model
        patch = model.image_size[0] // patch_grid(vision_config(model), *model.image_size)[0]
        return [*core_arms(self.runs.base), *further_arms(self.runs.base, patch)]

    def arms(self, which: str) -> list[Arm]:
        """The arms that `core`, `all` or names with commas between them stand for.

        Raises:
            UserError: a name that no arm has.
        """
        if which == "core":
            return core_arms(self.runs.base)
        return self.all_arms if which == "all" else chosen(self.all_arms, which.split(","))


def open_study(recipe: Path, protocol: Path, results: Path, overrides: tuple[str, ...], say: Say) -> Study:
    """The study of a recipe under a protocol, its corpus built where it is missing.

    Raises:
        UserError: a recipe that is wrong, or results that were found under another protocol.
    """
    record = Record.open(results, protocol_version(protocol, recipe, overrides))
    base = resolve_embedded(load_config(recipe, list(overrides)), say)
    sides = {count**0.5 for count in base.budget.num_visual_tokens}
    if not all(side.is_integer() for side in sides) or base.model.image_size[0] != base.model.image_size[1]:
        raise UserError(
            f"{recipe}: wanted square images and counts, for images that are scaled down to as many patches"
        )
    if len(base.data.train) != 1 or len(base.data.evaluation) != 1:
        raise UserError(f"{recipe}: wanted one folder of training and one of evaluation shards")
    folders = [Path(base.data.train[0]), Path(base.data.evaluation[0])]
    blind = [
        functools.partial(without_images, folder, folder.with_name(f"{folder.name}-without-images"))
        for folder in folders
    ]
    return Study(Runs(recipe, overrides, base, blind), results, record)


def train(study: Study, arms: Sequence[Arm], seeds: Sequence[int], workers: int, say: Say) -> tuple[list[Job], bool]:
    """Train what the record lacks, adding each run as it ends; returns (jobs without an end, whether a signal stopped it).

    Raises:
        UserError: a run that was asked other questions.
    """
    made_by = MadeBy.here(study.runs.base)
    resolved = functools.partial(resolve_embedded, say=lambda text: None)
    jobs = [job for job in jobs_of(study.runs, resolved, arms, seeds) if _is_wanted(study.record, job, made_by)]

    def take_in(job: Job) -> None:
        study.record.add(job, study.runs.layout(job), made_by)
        study.record.save(study.results)

    say(f"study     {len(jobs)} runs to do of {len(arms) * len(seeds)}, {workers} at once")
    pool = Workers(study.runs, workers, "-".join(made_by), take_in, say)
    return pool.run(jobs), pool.is_stopped


def _is_wanted(record: Record, job: Job, made_by: MadeBy) -> bool:
    known = record.runs.get(job.name)
    return known is None or (known["code"], known["parts"], known["num_steps"]) != (*made_by, job.num_steps)


def take_times(study: Study, rounds: int, say: Say) -> None:
    """Time what the flexible arm is compared with, by turns, and keep it in the record; see `times.measure`.

    Raises:
        UserError: a run that did not reach its end.
    """
    study.record.times = measure(study.runs, study.all_arms, TIMED_STEPS, rounds, say)
    study.record.save(study.results)


def judge(study: Study, seeds: Sequence[int], page: Path, say: Say, beside: Path | None = None) -> Findings:
    """Tables into the page, plots beside the record, and the verdicts said.

    beside: another record under the same protocol, with pretrained parts of its own. It has its tables on the page, and so has what
    both come to: `TOGETHER`. Where it cannot be judged, it is named and left out.

    Raises:
        UserError: the flexible arm is not whole.
    """
    findings = Findings.of(study.record, study.all_arms, seeds)
    for line in findings.problems:
        say(f"left out  {line}")
    say("\n" + (TABLES["verdicts"](findings) if len(seeds) > 1 else TABLES["accuracy"](findings)))
    for name, plot in PLOTS.items():
        if len(seeds) > 1 or plot is not plot_differences:  # an interval needs two seeds
            plot(findings, study.results.with_name(f"{study.results.stem}-{name}.png"))
    all_findings = {study.results.stem: findings}
    if beside:
        try:
            other = Findings.of(Record.open(beside, study.record.protocol), study.all_arms, seeds)
            all_findings |= {beside.stem: other, TOGETHER: Findings.together([findings, other])}
            say(f"\ntogether with {beside}\n\n{TABLES['verdicts'](all_findings[TOGETHER])}")
        except UserError as error:  # what was trained is not lost for it
            say(f"left out  {beside}: {error}")
    if page.exists():
        for stem, found in all_findings.items():
            write_whole(page, filled(page.read_text(), found, stem))
    return findings
