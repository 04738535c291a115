"""Ranks and shards: who this process is, and the engine that trains across all of them."""

from .engine import (
    Engine,
    gathered,
    load_ds_config,
    quiet_libraries,
    resolve_ds_config,
    sharded_loading,
    start_process_group,
    zero_stage,
)
from .environment import Launch, join
from .heartbeat import Heart
from .ranks import Ranks
from .world import check_world

__all__ = [
    "Engine",
    "Heart",
    "Launch",
    "Ranks",
    "check_world",
    "gathered",
    "join",
    "load_ds_config",
    "quiet_libraries",
    "resolve_ds_config",
    "sharded_loading",
    "start_process_group",
    "zero_stage",
]
