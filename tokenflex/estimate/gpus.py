"""What is known of GPUs by their makers' data sheets: memory here, dense 16-bit FLOPs per second in `telemetry.peaks`."""

from dataclasses import dataclass

from ..errors import UserError
from ..telemetry.peaks import PEAK_BF16


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """flops: dense bf16 matrix products, per second. memory: bytes."""

    name: str
    flops: float
    memory: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100", flops=PEAK_BF16["A100"], memory=80e9),
        Gpu(name="a100-40", flops=PEAK_BF16["A100"], memory=40e9),
        Gpu(name="h100", flops=PEAK_BF16["H100"], memory=80e9),
        Gpu(name="h200", flops=PEAK_BF16["H200"], memory=141e9),
        Gpu(name="h20", flops=PEAK_BF16["H20"], memory=96e9),
        Gpu(name="gh200", flops=PEAK_BF16["GH200"], memory=96e9),
        Gpu(name="b200", flops=PEAK_BF16["B200"], memory=180e9),
        Gpu(name="b300", flops=PEAK_BF16["B300"], memory=288e9),
        Gpu(name="l40s", flops=PEAK_BF16["L40S"], memory=48e9),
        Gpu(name="rtx4090", flops=PEAK_BF16["RTX 4090"], memory=24e9),
        Gpu(name="mi300x", flops=PEAK_BF16["MI300X"], memory=192e9),
    )
}
"""By the name that `--gpu` takes; the SXM form where there are several."""


def gpu_named(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        UserError: it is not in it.
    """
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise UserError(
            f"--gpu {name}: not in the table; wanted one of {', '.join(GPUS)}, or its figures by --peak-tflops and --gpu-memory-gb"
        ) from None
