"""What of DeepSpeed's ZeRO this trainer can save, refuse a step of and resume; anything else is refused before weights load."""

from typing import Any

from ..errors import UserError
from .engine import zero_stage

REFUSED = {
    "mics_shard_size": "weights would be cut otherwise than checkpoints say; use zero_hpz_partition_size",
    "zenflow": "its updates come from a thread that no step can be kept from",
}
"""Keys of `zero_optimization` that do not work here, and why."""


def check_zero(ds_config: dict[str, Any], num_ranks: int, *, is_compiled: bool = False, has_int8: bool = False) -> None:
    """See that the ZeRO settings of a DeepSpeed configuration are ones that a run survives under, on so many ranks.

    is_compiled: blocks of the model are (`train.compile`). has_int8: frozen parts are in 8 bit (`model.*_frozen_dtype`).

    Raises:
        UserError: they are not; the key is named, with what to set instead.
    """
    stage, zero = zero_stage(ds_config), ds_config.get("zero_optimization", {})

    def refuse(key: str, why: str) -> None:
        raise UserError(f"--ds_config: zero_optimization.{key}: {why}")

    if stage not in (0, 1, 2, 3):
        refuse(f"stage={stage}", "ZeRO has the stages 0 to 3")
    if stage == 3 and is_compiled:
        refuse(
            "stage=3",
            "gathers weights inside the blocks that train.compile=blocks compiles; set stage 2, or compile off",
        )
    if stage == 3 and has_int8:
        refuse("stage=3", "cuts weights as they load; model.*_frozen_dtype=int8 wants whole rows: set stage 2, or same")
    for key, why in REFUSED.items():
        if zero.get(key) not in (None, -1, False):
            refuse(key, why)
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key) or {"device": "none"}
        device = offload.get("device", "none")
        if device not in ("none", "cpu"):
            refuse(f"{key}.device={device}", "what lies on NVMe is in no checkpoint; set it to cpu")
        if device == "cpu" and (stage == 0 or (stage < 3 and key == "offload_param")):
            wanted = "1, 2 or 3" if key == "offload_optimizer" else "3"
            refuse(key, f"DeepSpeed would ignore it at stage {stage}; set stage {wanted}, or leave it out")
        if offload.get("ratio", 1.0) != 1.0:
            refuse(
                f"{key}.ratio={offload['ratio']}", "part of the weights would have an optimizer that nothing can veto"
            )
        if offload.get("super_offload"):
            refuse(f"{key}.super_offload", REFUSED["zenflow"])
    size = zero.get("zero_hpz_partition_size", 1)
    if size > 1 and stage != 3:
        refuse(f"zero_hpz_partition_size={size}", f"needs stage 3, this is stage {stage}")
    if size > 1 and num_ranks % size:
        refuse(
            f"zero_hpz_partition_size={size}",
            f"does not divide the {num_ranks} ranks; set it to the number of ranks on a node",
        )
