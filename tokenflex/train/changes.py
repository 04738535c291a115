"""What of a recipe may change when a run goes on, and what would make it another run under the old name.

Three kinds of keys: those that say *how* the run is carried out change freely; those that say what comes *next* (rates,
schedules, weighting) change with a line; all others say what the run *is*, and are refused. A run that is complete does no
further step, so under it nothing that a step would have used may change.
"""

from ..config import RunConfig
from ..errors import UserError

HOW = (
    "output_dir",
    "evaluate.",
    "data.cache_dir",
    "data.shard_cache_gb",
    "data.evaluation",
    "data.num_workers",
    "data.packs_per_micro_batch",
    "data.max_bad_fraction",
    "model.gradient_checkpointing",
    "model.liger",
    "model.probe",
    "model.projector_backend",
    "model.trust_remote_code",
    "train.compile",
    "train.export_adapter",
    "train.export_average",
    "train.fused_loss",
    "train.hang_timeout_s",
    "train.keep_best",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.log_every",
    "train.log_samples",
    "train.max_failed_saves",
    "train.resume_from",
    "train.save_every",
    "train.startup_timeout_s",
    "train.tensorboard",
    "train.wandb",
)
"""Keys, or beginnings of keys, that change freely."""
NEXT = (
    "optimizer.betas",
    "optimizer.decay_fraction",
    "optimizer.eps",
    "optimizer.final_fraction",
    "optimizer.max_grad_norm",
    "optimizer.muon_momentum",
    *(
        f"optimizer.{part}.{key}"
        for part in ("projector", "text", "vision")
        for key in ("betas", "layer_decay", "learning_rate", "weight_decay")
    ),
    "optimizer.schedule",
    "optimizer.warmup_fraction",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "train.consistency",
    "train.ema_decay",
    "train.loss_weighting",
    "train.max_bad_steps",
    "train.max_rollbacks",
    "train.num_steps",
    "train.spike_sigma",
)
"""Keys that change with a line."""
BEGINNINGS = ("model.init_from", "model.tokenizer")
"""Where a model began, which a run that branches off another's checkpoint need not repeat; the tokenizer is held by the data's index."""


def check_changes(before: dict, recipe: RunConfig, where: str, step: int) -> list[str]:
    """A line for each key that a run with checkpoints goes on with otherwise than before.

    Args:
        before: the recipe that the run was last started with, as plain values.
        step: optimizer steps that the run has done.

    Raises:
        UserError: a key that says what the run is has changed, or one that its steps used when there are none left, or
            `train.num_steps` is below the steps done.
    """
    now = recipe.model_dump(mode="json")
    changed = {key: (old, new) for key, old, new in _differences(before, now) if not key.startswith(HOW)}
    num_steps = recipe.train.num_steps
    if num_steps < step:
        raise UserError(f"{where}: train.num_steps={num_steps}, but {step} steps are done; set it to {step} or more")
    refused = {key for key in changed if not key.startswith(NEXT)}
    why = "its checkpoints were made with"
    if step >= num_steps:
        refused, why = set(changed) - {"train.num_steps"}, f"its {step} steps are done, with"
    mend = "set it back, choose another name=..., or begin anew with --fresh"
    _refuse({key: changed[key] for key in refused}, f"{where}: {why}", mend)
    return [f"changed   {key} was {old}, is {new} from here on" for key, (old, new) in sorted(changed.items())]


def check_branch(before: dict, recipe: RunConfig, where: str) -> None:
    """That a run which goes on from another run's checkpoint has that run's model, in what no weight's shape tells too.

    Args:
        before: the other run's recipe, as plain values.

    Raises:
        UserError: a key under `model` that says what the model is has changed.
    """
    free = (*HOW, *BEGINNINGS)
    differences = _differences(before, recipe.model_dump(mode="json"))
    changed = {
        key: (old, new) for key, old, new in differences if key.startswith("model.") and not key.startswith(free)
    }
    _refuse(changed, f"{where}: its checkpoints were made with", "set it as there")


def _refuse(changed, why, mend):
    """Name what has changed, if anything has.

    Raises:
        UserError: it has; the first key comes with both values, the others without.
    """
    if not changed:
        return
    key = min(changed)
    old, new = changed[key]
    others = f" (and {len(changed) - 1} more: {', '.join(sorted(changed.keys() - {key}))})" if len(changed) > 1 else ""
    raise UserError(f"{why} {key}={old}, the recipe says {new}{others}; {mend}")


def _differences(before, now, prefix=""):
    """(dotted key, value before, value now) of every leaf that differs; keys that `before` lacks are new in this release."""
    for key, value in now.items():
        if key not in before:
            continue
        old, path = before[key], f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(old, dict) and prefix in ("", "optimizer."):
            yield from _differences(old, value, f"{path}.")
        elif value != old:
            yield path, old, value
