"""Ranks and shards: who this process is, and the engine that trains across all of them."""

from .engine import (
    Engine,
    Update,
    gathered,
    join_ranks,
    load_ds_config,
    quiet_libraries,
    resolve_ds_config,
    sharded_loading,
    zero_stage,
)
from .environment import Launch, join
from .heartbeat import Heartbeat
from .ranks import Ranks
from .world import check_world
from .zero import check_zero

__all__ = [
    "Engine",
    "Heartbeat",
    "Launch",
    "Ranks",
    "Update",
    "check_world",
    "check_zero",
    "gathered",
    "join",
    "join_ranks",
    "load_ds_config",
    "quiet_libraries",
    "resolve_ds_config",
    "sharded_loading",
    "zero_stage",
]
