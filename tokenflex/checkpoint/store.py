"""Checkpoints of a run: one folder per step, named complete only when every rank has written its part.

The tensors are written in DeepSpeed's own format for now; everything that knows it is behind `engine.save` and
`engine.load`. A checkpoint counts only once `complete.json` is there, which rank 0 writes last and in one rename.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch

from ..errors import UserError

COMPLETE = "complete.json"


def save_checkpoint(engine, folder, state, keep):
    """Write the checkpoint of `state["step"]` under `folder`; every rank must call it.

    `state` is plain JSON values: step, position in the data, and what else a resumed run needs. Older checkpoints beyond
    the newest `keep` are removed afterwards.
    """
    folder = Path(folder)
    tag = f"step-{state['step']:08d}"
    if engine.launch.rank == 0:
        shutil.rmtree(folder / tag, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    engine.save(folder, tag, {"state": state})
    torch.distributed.barrier()
    if engine.launch.rank == 0:
        temporary = folder / tag / (COMPLETE + ".tmp")
        temporary.write_text(json.dumps({**state, "num_ranks": engine.launch.num_ranks}))
        os.replace(temporary, folder / tag / COMPLETE)
        for old in complete_checkpoints(folder)[:-keep]:
            shutil.rmtree(folder / old)
    torch.distributed.barrier()


def complete_checkpoints(folder):
    """Tags of complete checkpoints under `folder`, oldest first."""
    found = [path.parent.name for path in Path(folder).glob(f"step-*/{COMPLETE}")]
    return sorted(tag for tag in found if re.fullmatch(r"step-\d+", tag))


def load_newest_checkpoint(engine, folder):
    """Load the newest complete checkpoint into the engine; returns its state, or None where there is none.

    Raises:
        UserError: it was written by another number of ranks, which DeepSpeed's format cannot read.
    """
    tags = complete_checkpoints(folder)
    if not tags:
        return None
    state = json.loads((Path(folder) / tags[-1] / COMPLETE).read_text())
    if state["num_ranks"] != engine.launch.num_ranks:
        raise UserError(
            f"checkpoint {folder}/{tags[-1]}: written by {state['num_ranks']} ranks, this job has {engine.launch.num_ranks}; "
            f"start with {state['num_ranks']} ranks, or with --fresh to begin anew"
        )
    engine.load(folder, tags[-1])
    return state
