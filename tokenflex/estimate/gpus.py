"""What is known of GPUs: dense 16-bit FLOPs per second and memory, by their makers' data sheets."""

from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """flops: dense bf16 matrix products, per second. memory: bytes."""

    name: str
    flops: float
    memory: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100", flops=312e12, memory=80e9),
        Gpu(name="a100-40", flops=312e12, memory=40e9),
        Gpu(name="h100", flops=989.4e12, memory=80e9),
        Gpu(name="h200", flops=989.4e12, memory=141e9),
        Gpu(name="h20", flops=148e12, memory=96e9),
        Gpu(name="gh200", flops=989.4e12, memory=96e9),
        Gpu(name="b200", flops=2250e12, memory=180e9),
        Gpu(name="b300", flops=2250e12, memory=288e9),
        Gpu(name="l40s", flops=362e12, memory=48e9),
        Gpu(name="rtx4090", flops=165.2e12, memory=24e9),
        Gpu(name="mi300x", flops=1307.4e12, memory=192e9),
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
