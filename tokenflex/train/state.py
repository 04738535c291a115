"""What a run is made of besides its configuration, and how it is saved, resumed and taken back."""

import importlib.metadata
import json
import platform
import random
from functools import cached_property

import numpy as np
import torch

from .. import __version__
from ..checkpoint import (
    CheckpointWriter,
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
from ..errors import Diverged, SavesFailed
from ..layout import step_of
from .spike_filter import Guard


def first_progress():
    """The progress of a run that has done nothing.

    step: optimizer steps done, skipped ones included. position: the next step in the data. bad: positions of the steps
    skipped in a row until now. passed_over: positions never to run again. num_rollbacks: since the run last got beyond
    `furthest`, the step at which it went back. history: the guard's. num_samples, num_bad_samples: met over all ranks.
    """
    return {
        "step": 0,
        "position": {"epoch": 0, "step": 0},
        "num_skipped": 0,
        "bad": [],
        "passed_over": [],
        "num_rollbacks": 0,
        "furthest": 0,
        "history": {},
        "num_samples": 0,
        "num_bad_samples": 0,
    }


class RunState:
    """The engine, the progress and their checkpoints. Every rank has one; every method is collective.

    Args:
        folder: of the checkpoints. heart: this rank's pulse.
            `log` is set once there is a meter.
    """

    def __init__(self, engine, ranks, config, folder, heart, say):
        self.engine, self.ranks, self.config, self.folder, self.say = engine, ranks, config, folder, say
        self.heart = heart
        self.progress = first_progress()
        self.num_failed = 0
        self.log = lambda event: None
        begin_folder(folder, ranks.rank)
        settings = config.train
        retention = Retention(last=settings.keep_checkpoints, every=settings.keep_every, best=settings.keep_best)
        self.writer = CheckpointWriter(folder, ranks, retention, heart.folder.name, self._describe)

    @property
    def guard(self):
        return Guard(self.config.train.spike_sigma, self.progress["history"])

    def resume(self, check):
        """Go on from the newest good checkpoint, if there is any; returns whether there was. `check` is an `EarlyCheck`.

        Raises:
            UserError: there are checkpoints but none is good, or they are of another model.
        """
        loaded = load_newest(self.folder, self.ranks, self._fill, say=self.say, check=check)
        if loaded is None:
            self._seed()
            return False
        self.say(
            f"resumed   from {self.folder / loaded.tag} at step {self.progress['step']}{_ranks_before(loaded, self.ranks)}"
        )
        changed = {k: (v, _versions().get(k)) for k, v in loaded.manifest.versions.items() if _versions().get(k) != v}
        for name, (before, now) in changed.items():
            self.say(
                f"note      {name} was {before} when that was saved and is {now} now; results may differ in the last bits"
            )
        self.writer.loaded(self.progress["step"])
        return True

    def save(self):
        """Begin to copy the state and to write it, in the background."""
        self.heart.phase("save", self.config.train.startup_timeout_s)
        self._note(self.writer.start(*self._tensors(), self.progress))

    def before_update(self):
        """Weights and moments are about to change: wait until what is being saved of them has been copied."""
        self.writer.before_update()

    def flags(self):
        """What this rank contributes to the agreement at the end of a step."""
        return self.writer.flags()

    def advance(self, is_busy, has_failed):
        """Bring a save forward, with the flags' maximum over all ranks."""
        self._note(self.writer.advance(is_busy, has_failed))

    def finish(self, must_be_saved=False):
        """Wait for a save under way.

        Raises:
            SavesFailed: it failed, and `must_be_saved`.
        """
        self.heart.phase("wait for the save", self.config.train.startup_timeout_s)
        self._note(self.writer.finish())
        if must_be_saved and self.num_failed:
            raise SavesFailed(
                f"checkpoints {self.folder}: the last save failed, so the run would go on from an older one; "
                "free space or set output_dir, then give the same command"
            )

    def skip(self, position, reason, names):
        """Record a step that moved nothing; `names` are its samples. Returns whether it is time to go back."""
        progress = self.progress
        progress["num_skipped"] += 1
        progress["bad"].append([position.epoch, position.step])
        self.say(f"skipped   step {progress['step']}: {reason}")
        self.log({"event": "skip", "step": progress["step"], "reason": reason, "samples": names})
        return len(progress["bad"]) >= self.config.train.max_bad_steps

    def accept(self):
        """Record a step that moved the weights."""
        self.progress["bad"] = []
        if self.progress["step"] > self.progress["furthest"]:
            self.progress["num_rollbacks"] = 0

    def roll_back(self):
        """Take the run back to before the steps that were skipped in a row, whose data are passed over from now on.

        Raises:
            Diverged: there is no checkpoint from before, or going back has not helped several times.
        """
        self.finish()
        bad, left = self.progress["bad"], self.progress["step"]
        count, passed_over = self.progress["num_rollbacks"] + 1, self.progress["passed_over"] + bad
        skipped = self.progress["num_skipped"]
        if count > self.config.train.max_rollbacks:
            raise Diverged(
                f"step {left}: went back {count - 1} times and the steps after that were bad each time; "
                "lower the learning rate, look at the data named in events.jsonl, or go on from an older checkpoint"
            )
        self.heart.phase("go back", self.config.train.startup_timeout_s)
        loaded = load_newest(self.folder, self.ranks, self._fill, max_step=left - len(bad), say=self.say)
        if loaded is None:
            raise Diverged(
                f"step {left}: {len(bad)} steps in a row were not finite or far out, and there is no checkpoint from before "
                "them to go back to; lower the learning rate, or save earlier (train.save_every)"
            )
        self.progress.update(num_rollbacks=count, passed_over=passed_over, furthest=left, num_skipped=skipped)
        self.ranks.on_main(lambda: self._remove_newer(loaded.manifest.step))
        self.writer.forget()
        self.say(f"back      to {loaded.tag} after {len(bad)} bad steps; their data are passed over")
        self.log({"event": "roll back", "step": left, "to": loaded.manifest.step, "passed_over": bad})

    def _remove_newer(self, step):
        """The steps after `step` will be run anew: what was saved of them is of a past that led nowhere."""
        for tag in tags(self.folder):
            if step_of(tag) > step:
                remove_folder(self.folder / tag)

    def _note(self, saved):
        if saved is None:
            return
        self.num_failed = self.num_failed + 1 if saved.problem else 0
        if not saved.problem:
            figures = {"seconds": round(saved.seconds, 4), "stall_s": round(saved.stall_s, 6), "bytes": saved.num_bytes}
            self.log({"event": "saved", "step": saved.step, **figures})
            if saved.note:
                self.say(f"note      step {saved.step} is saved, but {saved.note}")
            return
        self.say(f"not saved step {saved.step}: {saved.problem}; the checkpoint before it stands")
        self.log({"event": "save failed", "step": saved.step, "problem": saved.problem})
        if self.num_failed >= self.config.train.max_failed_saves:
            raise SavesFailed(
                f"checkpoints {self.folder}: {self.num_failed} saves in a row failed, the last at step {saved.step}: "
                f"{saved.problem}; free space or set output_dir, then give the same command"
            )

    def _tensors(self):
        """({name: live tensor} that lasts until the next update, {name: tensor} that may change before) of this rank."""
        lasting = named_pieces(self.engine.slices(), self.ranks.rank, self.ranks.num_ranks)
        passing = {f"random/{name}": state for name, state in _random_states().items()}
        if self.ranks.rank == 0:
            passing.update({f"buffer/{name}": buffer for name, buffer in self.engine.model.named_buffers()})
        return lasting, passing

    def _describe(self, progress):
        return {
            **self._constant,
            "num_updates": self.engine.num_updates,
            "score": Guard(0, progress["history"]).mean_loss(),
        }

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
            "config": self.config.model_dump(mode="json"),
            "model": model.config.to_dict(),
            "versions": _versions(),
        }

    def _fill(self, manifest, folder):
        ours = {name: (shape, is_trained) for name, (shape, _, is_trained) in self._constant["parameters"].items()}
        check_fits(folder, manifest, ours, is_whole=True)
        with self.engine.loading(manifest.num_updates) as slices:
            read_slices(folder, manifest, slices, self.ranks.rank)
            self._fill_buffers(manifest, folder)
        self.progress.clear()
        self.progress.update({**first_progress(), **manifest.progress})
        if manifest.num_ranks == self.ranks.num_ranks:
            with ShardReader(folder / shard_name(self.ranks.rank, self.ranks.num_ranks)) as reader:
                _set_random_states({name: reader.tensor("random", name) for name in reader.names("random")})
        else:
            self._seed()

    def _fill_buffers(self, manifest, folder):
        buffers = dict(self.engine.model.named_buffers())
        with ShardReader(folder / shard_name(0, manifest.num_ranks)) as reader:
            for name in reader.names("buffer"):
                if name in buffers:
                    buffers[name].copy_(reader.tensor("buffer", name))

    def _seed(self):
        """Draws from here on depend on (seed, step, rank) alone; where ranks come and go no generator can be handed on."""
        seed = (self.config.train.seed * 1_000_003 + self.progress["step"]) * 65_537 + self.ranks.rank
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)


def _ranks_before(loaded, ranks):
    before = loaded.manifest.num_ranks
    return "" if before == ranks.num_ranks else f", written by {before} ranks, read by {ranks.num_ranks}"


def _versions():
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"tokenflex": __version__, "python": platform.python_version(), **versions}


def _random_states():
    """The state of every generator a run may draw from, as tensors."""
    kind, numbers, *rest = np.random.get_state()
    plain = {"python": _listed(random.getstate()), "numpy": [kind, numbers.tolist(), *rest]}
    states = {name: torch.frombuffer(bytearray(json.dumps(s).encode()), dtype=torch.uint8) for name, s in plain.items()}
    states["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states):
    version, numbers, gauss = json.loads(bytes(states["python"].tolist()))
    random.setstate((version, tuple(numbers), gauss))
    kind, numbers, *rest = json.loads(bytes(states["numpy"].tolist()))
    np.random.set_state((kind, np.array(numbers, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _listed(state):
    version, numbers, gauss = state
    return [version, list(numbers), gauss]
