"""All ranks say where they are: what the job should be, and what it is, before anything costs time."""

import os
import socket
from collections.abc import Mapping, Sequence

from ..errors import UserError
from .ranks import Ranks


def check_world(ranks: Ranks, environment: Mapping[str, str] = os.environ) -> str:
    """One line on the ranks of this job and their nodes, after every rank has checked it. Every rank must call it.

    Under slurm/job.py the number of ranks and the nodes must be those of the job's allocation.

    Raises:
        UserError: the ranks are others than they should be.
    """
    own = environment.get("SLURMD_NODENAME") or socket.gethostname()
    launch = ranks.launch
    names = ranks.all_gather(own)
    nodes = list(dict.fromkeys(names))
    layout = ", ".join(f"{node}: {_ranks(names, node)}" for node in nodes)
    text = f"{launch.num_ranks} ranks on {len(nodes)} nodes ({layout}), started by {launch.launcher}"
    expected_ranks = int(environment.get("TOKENFLEX_EXPECTED_NUM_RANKS", launch.num_ranks))
    expected_nodes = environment.get("TOKENFLEX_EXPECTED_NODES", "").split(",")
    if len(names) != expected_ranks:
        raise UserError(
            f"this job is {text}; the allocation is for {expected_ranks} ranks: start it by slurm/pretrain.sh"
        )
    if expected_nodes != [""] and nodes != expected_nodes:
        raise UserError(f"this job is {text}; the allocation's nodes are {', '.join(expected_nodes)}, in this order")
    if names.count(own) != launch.local_num_ranks:
        raise UserError(
            f"this job is {text}; rank {launch.rank} on {own} was told that its node has {launch.local_num_ranks} ranks"
        )
    return text


def _ranks(names: Sequence[str], node: str) -> str:
    ranks = [rank for rank, name in enumerate(names) if name == node]
    is_block = ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 1
    return f"{ranks[0]}-{ranks[-1]}" if is_block else " ".join(map(str, ranks))
