"""The state of a run: the engine, the progress and their checkpoints; how it is saved, restored and taken back."""

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from .. import __version__
from ..checkpoint import (
    CheckpointWriter,
    Loaded,
    Pieces,
    Retention,
    ShardReader,
    begin_folder,
    check_fits,
    load_newest,
    named_pieces,
    read_slices,
    remove_folder,
    shard_name,
    tags,
)
from ..config import RunConfig
from ..errors import Diverged, SavesFailed
from ..layout import step_of
from ..parallel import Engine, Heartbeat, Ranks
from .progress import Progress, StepOutcome
from .random_states import random_states, seed_all, set_random_states
from .spike_filter import SpikeFilter


@dataclass(kw_only=True)
class RunState:
    """The engine, the progress and their checkpoints. Every rank has one; every method is collective.

    recipe: the configuration as it was written, which checkpoints carry. folder: of the checkpoints. heartbeat: this rank's.
    settle_data: (progress) -> nothing, or refuses it: whether a restored position means anything in the data that are there.
    record_event: writes down what happened, on rank 0. name_of: (sample id) -> the words by which a person finds it. say:
    prints on rank 0.
    """

    engine: Engine
    recipe: RunConfig
    folder: Path
    heartbeat: Heartbeat
    settle_data: Callable[[Progress], None]
    record_event: Callable[[dict], None]
    name_of: Callable[[int], str]
    say: Callable[[str], None]
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.num_failed = 0
        begin_folder(self.folder, self.ranks.rank)
        settings = self.recipe.train
        retention = Retention(last=settings.keep_checkpoints, every=settings.keep_every, best=settings.keep_best)
        attempt = self.heartbeat.folder.name
        self.writer = CheckpointWriter(self.folder, self.ranks, retention, attempt, self._describe)

    @property
    def ranks(self) -> Ranks:
        """The job."""
        return self.engine.ranks

    @property
    def spike_filter(self) -> SpikeFilter:
        """What judges steps, with the history that the progress holds."""
        return SpikeFilter(self.recipe.train.spike_sigma, self.progress.history)

    def restore(self, folder: Path, max_step: int | None = None, check: Callable | None = None) -> Loaded | None:
        """Take up the newest good checkpoint under `folder`: weights, moments, progress, generators. None where there is none.

        `max_step`: look at no newer one. `check`: an `EarlyCheck` begun before.

        Raises:
            UserError: there are checkpoints but none is good, or they are of another model.
        """
        options = {} if check is None else {"check": check}
        loaded = load_newest(folder, self.ranks, self._fill, max_step=max_step, say=self.say, **options)
        if loaded is not None:
            self._say_versions(loaded.manifest)
        return loaded

    def begin_anew(self) -> None:
        """Let draws begin from the run's seed, the step and the rank."""
        seed_all(self.recipe.train.seed, self.progress.step, self.ranks.rank)

    def _say_versions(self, manifest):
        now = _versions()
        for name, before in manifest.versions.items():
            if now.get(name) != before:
                self.say(
                    f"note      {name} was {before} when that was saved and is {now.get(name)} now; results may differ in the "
                    "last bits"
                )

    def record(self, outcome: StepOutcome) -> bool:
        """Move the progress on by a step; returns whether so many in a row were bad that it is time to go back."""
        must_go_back = bool(outcome.problem) and self._skip(outcome)
        self.progress.step += 1
        self.progress.position = outcome.next_position.as_dict()
        if not outcome.problem:
            self.progress.bad = []
            if self.progress.step > self.progress.furthest:
                self.progress.num_rollbacks = 0
        return must_go_back

    def _skip(self, outcome):
        progress, position = self.progress, outcome.position
        names = self.ranks.all_gather([self.name_of(sample_id) for sample_id in outcome.sample_ids])
        samples = sorted({name for some in names for name in some})
        progress.num_skipped += 1
        progress.bad.append([position.epoch, position.step])
        self.say(f"skipped   step {progress.step}: {outcome.problem}")
        self.record_event({"event": "skip", "step": progress.step, "reason": outcome.problem, "samples": samples})
        return len(progress.bad) >= self.recipe.train.max_bad_steps

    def save(self) -> None:
        """Begin to copy the state and to write it, in the background."""
        self.heartbeat.phase("save", self.recipe.train.startup_timeout_s)
        pieces, passing = self._tensors()
        self._note(self.writer.start(pieces, passing, self.progress.to_dict()))

    def before_update(self) -> None:
        """Weights and moments are about to change: wait until what is being saved of them has been copied."""
        self.heartbeat.phase("wait for the copy")
        self.writer.before_update()

    def flags(self) -> list[float]:
        """What this rank contributes to the agreement at the end of a step."""
        return self.writer.flags()

    def advance(self, is_busy: float, has_failed: float) -> None:
        """Bring a save forward, with the flags' maximum over all ranks."""
        self._note(self.writer.advance(is_busy, has_failed))

    def finish(self, must_be_saved: bool = False) -> None:
        """Wait for a save under way.

        Raises:
            SavesFailed: it failed, and `must_be_saved`.
        """
        self.heartbeat.phase("wait for the save", self.recipe.train.startup_timeout_s)
        self._note(self.writer.finish())
        if must_be_saved and self.num_failed:
            raise SavesFailed(
                f"checkpoints {self.folder}: the last save failed, so the run would go on from an older one; "
                "free space or set output_dir, then give the same command"
            )

    def roll_back(self) -> None:
        """Take the run back to before the steps that were skipped in a row, whose data are passed over from now on.

        Raises:
            Diverged: there is no checkpoint from before, or going back has not helped several times.
        """
        self.finish()
        before = self.progress
        left, bad, count = before.step, before.bad, before.num_rollbacks + 1
        settings = self.recipe.train
        if count > settings.max_rollbacks:
            raise Diverged(
                f"step {left}: went back {count - 1} times and the steps after that were bad each time; "
                "lower the learning rate, look at the data named in events.jsonl, or go on from an older checkpoint"
            )
        self.heartbeat.phase("go back", settings.startup_timeout_s)
        loaded = load_newest(self.folder, self.ranks, self._fill, max_step=left - len(bad), say=self.say)
        if loaded is None:
            raise Diverged(
                f"step {left}: {len(bad)} steps in a row were not finite or far out, and there is no checkpoint from before "
                "them to go back to; lower the learning rate, or save earlier (train.save_every)"
            )
        self.progress.num_rollbacks, self.progress.furthest = count, left
        self.progress.excluded_steps = before.excluded_steps + bad
        self.progress.num_skipped = before.num_skipped
        self.ranks.on_main(lambda: self._remove_newer(loaded.manifest.step))
        self.writer.forget()
        self.say(f"back      to {loaded.tag} after {len(bad)} bad steps; their data are passed over")
        self.record_event({"event": "roll back", "step": left, "to": loaded.manifest.step, "passed_over": bad})

    def _remove_newer(self, step):
        """The steps after `step` will be run anew: what was saved of them is of a past that led nowhere."""
        for tag in tags(self.folder):
            if (step_of(tag) or 0) > step:
                remove_folder(self.folder / tag)

    def _note(self, saved):
        if saved is None:
            return
        self.num_failed = self.num_failed + 1 if saved.problem else 0
        if not saved.problem:
            figures = {"seconds": round(saved.seconds, 4), "stall_s": round(saved.stall_s, 6), "bytes": saved.num_bytes}
            self.record_event({"event": "saved", "step": saved.step, **figures})
            if saved.note:
                self.say(f"note      step {saved.step} is saved, but {saved.note}")
            return
        self.say(f"not saved step {saved.step}: {saved.problem}; the checkpoint before it stands")
        self.record_event({"event": "save failed", "step": saved.step, "problem": saved.problem})
        if self.num_failed >= self.recipe.train.max_failed_saves:
            raise SavesFailed(
                f"checkpoints {self.folder}: {self.num_failed} saves in a row failed, the last at step {saved.step}: "
                f"{saved.problem}; free space or set output_dir, then give the same command"
            )

    def _tensors(self) -> tuple[Pieces, dict[str, torch.Tensor]]:
        """(what lasts until the next update, {name: tensor} that may change before) of this rank."""
        pieces = named_pieces(self.engine.slices(), self.ranks.rank, self.ranks.num_ranks)
        passing = {f"random/{name}": state for name, state in random_states().items()}
        if self.ranks.rank == 0:
            passing.update({f"buffer/{name}": buffer for name, buffer in self.engine.model.named_buffers()})
        return pieces, passing

    def _describe(self, progress):
        return {
            **self._constant,
            "num_updates": self.engine.num_updates,
            "score": self._score(progress),
        }

    def _score(self, progress):
        """What checkpoints are compared by: the loss of the validation at this very step, or without validations the mean of
        the last steps' losses."""
        if not self.recipe.evaluate.every:
            return SpikeFilter(0, progress["history"]).mean_loss()
        return progress["validation"]["loss"] if progress["validation"].get("step") == progress["step"] else None

    @cached_property
    def _constant(self):
        model = self.engine.model
        parameters = {
            name: [list(getattr(p, "ds_shape", p.shape)), str(p.dtype).removeprefix("torch."), p.requires_grad]
            for name, p in model.named_parameters()
        }
        return {
            "parameters": parameters,
            "buffers": [name for name, _ in model.named_buffers()],
            "config": self.recipe.model_dump(mode="json"),
            "model": model.config.to_dict(),
            "versions": _versions(),
        }

    def _fill(self, manifest, folder):
        ours = {name: (shape, is_trained) for name, (shape, _, is_trained) in self._constant["parameters"].items()}
        check_fits(folder, manifest, ours, is_whole=True)
        with self.engine.loading(manifest.num_updates) as slices:
            read_slices(folder, manifest, slices, self.ranks.rank)
            self._fill_buffers(manifest, folder)
        self.progress = Progress.from_dict(manifest.progress)
        self.settle_data(self.progress)
        if manifest.num_ranks == self.ranks.num_ranks:
            with ShardReader(folder / shard_name(self.ranks.rank, self.ranks.num_ranks)) as reader:
                set_random_states({name: reader.tensor("random", name) for name in reader.names("random")})
        else:
            self.begin_anew()

    def _fill_buffers(self, manifest, folder):
        buffers = dict(self.engine.model.named_buffers())
        with ShardReader(folder / shard_name(0, manifest.num_ranks)) as reader:
            for name in reader.names("buffer"):
                if name in buffers:
                    buffers[name].copy_(reader.tensor("buffer", name))


def _versions():
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"tokenflex": __version__, "python": platform.python_version(), **versions}
