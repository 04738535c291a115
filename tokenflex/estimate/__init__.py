"""Before a run: what it needs and how long it takes (`costs`), how it scales (`scaling`), and a first step tried on the spot.

`trace` runs a model on shapes alone, `workload` says what steps hold, `memory` what lies on a GPU, `gpus` what GPUs can do.
"""

from .costs import Assumptions, Estimate, estimate
from .gpus import GPUS, Gpu, gpu_named
from .text import describe
from .workload import AssumedSamples, Workload, workload_of

__all__ = [
    "GPUS",
    "AssumedSamples",
    "Assumptions",
    "Estimate",
    "Gpu",
    "Workload",
    "describe",
    "estimate",
    "gpu_named",
    "workload_of",
]
