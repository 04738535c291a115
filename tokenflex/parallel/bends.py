"""What DeepSpeed does not offer and is taken all the same: each bend with its reason, checked by `tests/parallel/test_bends.py`.

Checked against DeepSpeed 0.19. When a release moves what stands here, that test fails and says which bend, before a run
goes wrong. Where parameters and moments lie inside DeepSpeed's optimizers is a bend of its own: `slices.py`.
"""

import deepspeed
import torch


def without_shared_memory_collective() -> None:
    """Keep DeepSpeed from compiling its collective over shared memory on CPUs.

    It is compiled at first use, for minutes, and a build that was killed leaves a lock on which every later start hangs;
    gloo alone is fast enough on one host. An empty table of operators switches it off.
    """
    deepspeed.ops.__compatible_ops__ = {}


def grad_norm_before_update(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    """Global gradient norm of the step whose update is about to run, not yet read from the device; ZeRO stages 1 to 3.

    A scalar, negative or NaN where it is not finite.

    DeepSpeed's public `get_global_grad_norm` answers only after the update, when it is too late to leave it out; its
    wrapper of the optimizer has the norm by the time it calls the optimizer.
    """
    norm = engine.optimizer._global_grad_norm
    return torch.as_tensor(float("nan") if norm is None else norm)


def grad_norm_without_zero(model: torch.nn.Module) -> torch.Tensor:
    """The same at stage 0, where DeepSpeed keeps no norm: of the gradients as they lie in the parameters."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
