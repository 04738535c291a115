"""The launchers' own calls, compiled for a GPU that is not here: ``python kernel_launch.py 90``.

kernel_codegen.py names the arguments' types by hand; this goes through Triton's launch path instead, with the tensors,
descriptors, absent arguments and specialised integers (an N of 1 becomes a constant) that a real call has, and stops
short of the launch. Prints how many kernels it compiled.
"""

import sys

import torch
from tokenflex_kernels import frozen, fused, gated, geometry, pool, splice
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class AbsentGPU:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    class utils:  # noqa: N801  Triton's name
        @staticmethod
        def unload_module(module):
            """Nothing was loaded."""


def main(capability):
    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    driver.set_active(AbsentGPU(capability))
    path = "tma" if capability // 10 in (9, 10) else "pointer"
    zeros = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)  # noqa: E731
    for config in (gated.GATED_CONFIGS[path][1], gated.UNFUSED):
        for bias in (zeros(256), None):
            for stores in ((True, True), (True, False), (False, True)):
                gated.launch_gated(config, zeros(300, 64), zeros(256, 64), bias, *stores)
    for config in (gated.DGATED_CONFIGS[path][1], gated.UNFUSED):
        for flags in ((True, True), (True, False), (False, True)):
            gated.launch_dgated(config, zeros(300, 96), zeros(96, 128), zeros(300, 256), *flags)
    plan = geometry.pool_plan([(5, 5), (7, 13)], [(8, 8), (3, 5)], "resize")
    one = geometry.pool_plan([(1, 1)], [(1, 1)])
    pool.launch(pool.CONFIGS[0], zeros(116, 64), plan, False, None)
    pool.launch(pool.CONFIGS[-1], zeros(79, 200)[:, 8:], plan, True, None)
    for scale, keep in ((zeros(64), True), (None, True), (None, False)):
        pool.launch(pool.CONFIGS[1], zeros(116, 64), plan, False, pool.NormOf(scale, scale, 1e-5, keep))
        pool.launch(pool.CONFIGS[1], zeros(9, 64), None, False, pool.NormOf(scale, scale, 1e-5, keep))
    for config in fused.CONFIGS if path == "tma" else ():
        for norm in (pool.NormOf(zeros(64), None, 1e-5, True), pool.NormOf(None, None, 1e-5, False), None):
            fused.launch(config, zeros(116, 64), plan, norm, zeros(256, 64), zeros(256) if norm else None, norm is None)
    pool.norm_grad(zeros(9, 64), zeros(9, 64), zeros(9).float(), zeros(64), True, True)
    pool.affine(zeros(9, 64), zeros(64), None)
    frozen.weight_grads(zeros(96, 64), zeros(96, 64), zeros(96).float(), zeros(64), zeros(64))
    splice.splice(zeros(9, 64), zeros(5, 64), torch.arange(5))
    splice.splice_backward(zeros(9, 64), torch.arange(5), True, True)

    # Every size 1: Triton then passes plain numbers where it otherwise passes tensors.
    pool.launch(pool.CONFIGS[0], zeros(1, 1), one, False, None)
    splice.splice(zeros(1, 1), zeros(1, 1), torch.arange(1))
    for config in (gated.GATED_CONFIGS["pointer"][-1], gated.UNFUSED):
        gated.launch_gated(config, zeros(1, 1), zeros(2, 1), zeros(2), True, True)
    for config in (gated.DGATED_CONFIGS["pointer"][-1], gated.UNFUSED):
        gated.launch_dgated(config, zeros(1, 1), zeros(1, 1), zeros(1, 2), True, True)
    print(len(compiled))


if __name__ == "__main__":
    main(int(sys.argv[1]))
