"""Before weights load: whether a model's parts can have what a recipe asks of them, and whether there is room for what a run holds
all the time. Found on shapes, with the ranks and the memory that are there."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from ..errors import UserError
from ..model import TokenFlexForConditionalGeneration
from ..model.adapters import check_adapters
from ..model.build import shaped_model
from ..model.compiled import check_blocks
from ..parallel import Ranks, zero_stage
from ..train.optimizer import parameter_groups
from ..train.run import precision_of
from .memory import Memory, ModelSizes, stage_memory


def check_room(
    config: RunConfig, ds_config: Mapping[str, Any], ranks: Ranks, say: Callable[[str], None] = print
) -> None:
    """See that a recipe's parts take its adapters and its compiled blocks, and that its states fit; every rank calls it.

    States are weights, gradients, masters, moments and the average: what no step can do without, to the byte. What comes
    on top (activations, buffers) `tokenflex estimate` has, and a dry run tries.

    Args:
        config: with `embedded` replaced.
        ds_config: as `parallel.load_ds_config` gives it.
        say: told where nothing could be held against what is free.

    Raises:
        UserError: they do not; what takes how much, what is free, and what to set.
    """
    check_adapters(config.model)
    dtype = torch.bfloat16 if precision_of(config.train.precision, ranks.device) == "bf16" else torch.float32
    model = _shaped(config, dtype)
    if model is None:
        say("memory    not held against what is free: a part cannot be built on shapes alone")
        return
    if config.train.compile == "blocks":
        check_blocks(model)
    parameter_groups(model, config.optimizer)
    stage, sizes = zero_stage(dict(ds_config)), ModelSizes.of(model, ds_config)
    plain = {"zero_optimization": {**ds_config.get("zero_optimization", {}), **NOT_OFFLOADED}}
    with_average = config.train.ema_decay > 0
    here, whole = (
        stage_memory(sizes, settings, stage, ranks.num_ranks, with_average=with_average)
        for settings in (ds_config, plain)
    )
    is_gpu = ranks.device.type == "cuda"
    on_host = whole.states - here.states if is_gpu else whole.states
    places = [("this machine's memory", on_host * ranks.launch.local_num_ranks, free_memory())]
    if is_gpu:
        places.insert(0, ("a GPU", here.states, float(torch.cuda.mem_get_info(ranks.device)[0])))
    refusals = [_refusal(*place, whole) for place in places if place[1] > place[2]]
    for rank, found in enumerate(ranks.all_gather(refusals)):  # all end alike, since the main rank speaks for all
        if found:
            raise UserError(f"memory, rank {rank}: {found[0]}")


def _shaped(config: RunConfig, dtype: torch.dtype) -> TokenFlexForConditionalGeneration | None:
    """The model on shapes, or None where a part's own code fails there: whether it can be built at all, building tells.

    Raises:
        UserError: an adapter that a part cannot have.
    """
    try:
        return shaped_model(config.model, config.budget, dtype)
    except (RuntimeError, NotImplementedError):
        return None
    except UserError as error:
        if error.__cause__ is None:  # ours, and not what a part's code raised
            raise
        return None


NOT_OFFLOADED = {"offload_optimizer": None, "offload_param": None}


def _refusal(where: str, wanted: float, free: float, whole: Memory) -> str:
    """What is wanted by cause, what is free, and what to set."""
    causes = {word: getattr(whole, cause) / whole.states for cause, word in WORDS.items() if getattr(whole, cause)}
    listed = ", ".join(f"{word} {100 * share:.0f} %" for word, share in causes.items())
    mend = "take more ranks, a higher ZeRO stage or smaller parts (tokenflex estimate has the table)"
    if whole.average and (1 - whole.average / whole.states) * wanted <= free:
        mend = f"set train.ema_decay=0, without which it fits, or {mend}"
    return f"a run of this recipe holds {wanted / 1e9:.3g} GB in {where} ({listed}), and {free / 1e9:.3g} GB are free; {mend}"


WORDS = {
    "weights": "weights",
    "gradients": "gradients",
    "master": "fp32 weights",
    "moments": "moments",
    "average": "their average",
}
"""Causes of `Memory.states`, in words."""


def free_memory(root: str = "/") -> float:
    """Bytes of memory that processes of this machine (or of the control group that they are in) may still take."""
    text = (Path(root) / "proc/meminfo").read_text()
    kilobytes = {name: int(number) for name, number in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    free = float(1024 * (kilobytes["MemAvailable"] + kilobytes.get("SwapFree", 0)))
    group = Path(root) / "sys/fs/cgroup"
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        free = min(free, int(most) - int(used.read_text()) + (int(cached[1]) if cached else 0))
    return free
