"""How much memory this process has had at most."""

import resource

import torch


def peak_memory_gb(device: torch.device) -> float:
    """The most that torch has had on a GPU since its peak was last reset, or on a CPU the process itself since it began, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
