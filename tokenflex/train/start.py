"""Where a run begins: four ways, tried in order."""

from pathlib import Path

from ..checkpoint import EarlyCheck, tags
from ..errors import UserError
from ..layout import RunLayout, step_of
from .state import RunState


def start(state: RunState, layout: RunLayout, resume_from: str, check: EarlyCheck) -> None:
    """Take up the first of four beginnings that there is; every rank must call it.

    Raises:
        UserError: there are checkpoints but none is good, or they are of another model; or `resume_from` names none.
    """
    # 1. The run's own newest good checkpoint: the same command goes on where it was, whatever else the recipe says.
    loaded = state.restore(state.folder, check=check)
    if loaded is not None:
        state.writer.loaded(state.progress.step)
        state.say(
            f"resumed   from {state.folder / loaded.tag} at step {state.progress.step}{_ranks_before(state, loaded)}"
        )
        return
    # 2. Another run's checkpoint with moments, position and generators (train.resume_from): a cooldown branched off, say.
    if resume_from:
        folder, step = other_run(resume_from)
        loaded = state.restore(folder, max_step=step)
        if loaded is None or step not in (None, loaded.manifest.step):
            raise UserError(f"train.resume_from {resume_from}: cannot be loaded; see: tokenflex checkpoint verify")
        state.progress.num_rollbacks = state.progress.furthest = 0
        state.say(f"branched  from {folder / loaded.tag} at step {state.progress.step}{_ranks_before(state, loaded)}")
        return
    # 3. Weights alone, from an exported model (model.init_from) or pretrained parts: the model was built with them.
    # 4. From scratch: it was drawn from train.seed. Either way nothing has been learned here yet.
    state.begin_anew()
    state.say(f"new run   {layout.root}: there is no checkpoint")


def other_run(text: str) -> tuple[Path, int | None]:
    """(folder of checkpoints, step or None for the newest) of a run's folder or one of its checkpoints.

    Raises:
        UserError: it is neither.
    """
    folder = Path(text).expanduser()
    if step_of(folder.name) is not None and folder.is_dir():
        return folder.parent, step_of(folder.name)
    if tags(RunLayout(folder).checkpoints):
        return RunLayout(folder).checkpoints, None
    raise UserError(
        f"train.resume_from {text}: no checkpoint there; wanted a run's folder (runs/NAME) or one of its checkpoints/step-*"
    )


def _ranks_before(state, loaded):
    before, now = loaded.manifest.num_ranks, state.ranks.num_ranks
    return "" if before == now else f", written by {before} ranks, read by {now}"
