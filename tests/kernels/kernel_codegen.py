"""Compile Triton kernels for a GPU that is not here, and count what matters in the machine code.

Triton's wheel holds the whole tool chain (ptxas, cuobjdump, nvdisasm): no GPU, driver or CUDA toolkit is needed. An
invalid configuration can abort the process, so the tests run this file as a subprocess: ``python kernel_codegen.py 90``
prints one JSON object per shipped configuration.
"""

import json
import re
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile


def compile_for(kernel, signature, constants, capability, **options):
    """Compile ``kernel``; ``signature`` maps names to '*bf16', 'i32', 'i32:16' (a multiple of 16) or a descriptor.

    Names absent from ``signature`` are constants: the value in ``constants``, or None.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types[name][0] == "*" or types[name].endswith(":16")
    }
    values = {name: constants.get(name) for name, kind in types.items() if kind == "constexpr"}
    source = ASTSource(
        fn=kernel, signature={n: t.split(":")[0] for n, t in types.items()}, constexprs=values, attrs=aligned
    )
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def measure(compiled):
    """Registers, shared memory and counts of instructions of a compiled kernel; spills are traffic to local memory."""
    sass, ptx = compiled.asm["sass"], compiled.asm["ptx"]
    count = lambda pattern: len(re.findall(pattern, sass))  # noqa: E731
    return {
        "registers": 1 + max(map(int, re.findall(r"\bR(\d+)\b", sass))),
        "spills": count(r"\b(?:STL|LDL)\b"),
        "shared_bytes": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "loads": count(r"\bLDG\.E"),
        "loads_16_bytes": count(r"\bLDG\.E\S*\.128"),
        "copies": count(r"\bLDGSTS\.E"),
        "copies_16_bytes": count(r"\bLDGSTS\.E\S*\.128"),
        "stores": count(r"\bSTG\.E"),
        "stores_16_bytes": count(r"\bSTG\.E\S*\.128"),
        "descriptor_loads": count(r"\bUTMALDG"),
        "descriptor_stores": count(r"\bUTMASTG"),
        "hmma": count(r"\bHMMA"),
        "atomics": count(r"\b(?:ATOM|ATOMG|RED)\b"),
        "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\S*?\.(m64n\d+k\d+)", ptx))),
        "tcgen05": "tcgen05.mma" in ptx,
        "pipelined": "wgmma.wait_group.sync.aligned 1" in ptx,
    }


def _descriptor(dtype, *block):
    return f"tensordesc<{dtype}[{', '.join(map(str, block))}]>"


def pool_cases():
    """(name, kernel, signature, constants, options) of every pool configuration, forward and backward; float32 once."""
    from tokenflex_kernels import pool

    for config in pool.CONFIGS:
        for dtype, size in (("bf16", 2), ("fp32", 4))[: 2 if config == pool.CONFIGS[0] else 1]:
            for uniform in (True, False):
                signature = {
                    "source": f"*{dtype}",
                    "out": f"*{dtype}",
                    "table": "*i32",
                    "weight": "*fp32",
                    "num_rows": "i32",
                    "channels": "i32:16",
                }
                constants = {
                    "ROWS": config.rows,
                    "CHANNELS": config.channel_bytes // size,
                    "CELLS": 5 if uniform else 2,
                    "UNIFORM": uniform,
                }
                yield (
                    f"pool {config} {dtype} uniform={uniform}",
                    pool.pool_rows,
                    signature,
                    constants,
                    {"num_warps": config.num_warps},
                )


def gated_cases(path, dtype):
    """Every shipped configuration of ``gated``, with and without what training stores; for float16 only the first."""
    from tokenflex_kernels import gated

    for config in gated.GATED_CONFIGS[path][: None if dtype == "bf16" else 1]:
        for training in (True, False):
            tile = _descriptor(dtype, config.m, config.n)
            sizes = {"bias": f"*{dtype}", "M": "i32", "N": "i32:16", "K": "i32:16"}
            constants = {"BM": config.m, "BN": config.n, "BK": config.k, "GROUP": gated.GROUP_M, "HAS_BIAS": True, "STORE_INNER": True,
                             "STORE_GATE_UP": training}  # fmt: skip
            if path == "tma":
                kernel = gated.gated_tma
                constants["NUM_PROGRAMS"] = 132 * config.per_sm
                signature = dict(sizes, tokens=_descriptor(dtype, config.m, config.k),
                                 weight=_descriptor(dtype, 2, config.n, config.k), inner=tile)  # fmt: skip
                if training:
                    signature |= {"gate_out": tile, "up_out": tile}
            else:
                kernel = gated.gated_pointer
                signature = dict(sizes, tokens=f"*{dtype}", weight=f"*{dtype}", inner=f"*{dtype}")
                if training:
                    signature["gate_up"] = f"*{dtype}"
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "programs_per_sm": config.per_sm}
            yield f"gated {gated.name_of(config)} {dtype} training={training}", kernel, signature, constants, options


def dgated_cases(path, dtype):
    """Every shipped configuration of ``dgated``, with and without what a trained down projection needs; likewise."""
    from tokenflex_kernels import gated

    for config in gated.DGATED_CONFIGS[path][: None if dtype == "bf16" else 1]:
        for inner in (True, False):
            pieces = gated.pieces_of(config, inner)
            tile = _descriptor(dtype, config.m, config.n // pieces)
            sizes = {"bias_sums": "*fp32", "M": "i32", "N": "i32:16", "K": "i32:16"}
            constants = {
                "BM": config.m,
                "BN": config.n,
                "BK": config.k,
                "GROUP": gated.GROUP_M,
                "HAS_BIAS": True,
                "STORE_INNER": inner,
            }
            if path == "tma":
                kernel = gated.dgated_tma
                constants |= {"NUM_PROGRAMS": 132 * config.per_sm, "PIECES": pieces}
                signature = dict(sizes, d_out=_descriptor(dtype, config.m, config.k), weight=_descriptor(dtype, config.k, config.n),
                                 gate=tile, up=tile, d_gate=tile, d_up=tile)  # fmt: skip
                if inner:
                    signature["inner"] = tile
            else:
                kernel = gated.dgated_pointer
                signature = dict(
                    sizes, d_out=f"*{dtype}", weight=f"*{dtype}", gate_up=f"*{dtype}", d_gate_up=f"*{dtype}"
                )
                if inner:
                    signature["inner"] = f"*{dtype}"
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "programs_per_sm": config.per_sm}
            yield f"dgated {gated.name_of(config)} {dtype} inner={inner}", kernel, signature, constants, options


def elementwise_cases():
    """The kernels with one configuration."""
    from tokenflex_kernels import gated, splice

    rows, columns, num_warps = gated.ELEMENTWISE
    sizes, options = {"M": "i32", "N": "i32:16"}, {"num_warps": num_warps}
    constants = {"ROWS": rows, "COLUMNS": columns, "HAS_BIAS": True, "STORE_INNER": True}
    yield "elementwise swiglu_rows", gated.swiglu_rows, dict(sizes, gate_up="*bf16", inner="*bf16"), constants, options
    signature = dict(sizes, d_inner="*bf16", gate_up="*bf16", d_gate_up="*bf16", inner="*bf16", bias_sums="*fp32")
    yield "elementwise swiglu_grad_rows", gated.swiglu_grad_rows, signature, constants, options
    signature = {
        "text": "*bf16",
        "visual": "*bf16",
        "source": "*i32",
        "out": "*bf16",
        "num_rows": "i32",
        "width": "i32:16",
    }
    constants = {"ROWS": splice.ROWS, "COLUMNS": splice.COLUMN_BYTES // 2, "HAS_TEXT": True, "HAS_VISUAL": True}
    yield "elementwise route_rows", splice.route_rows, signature, constants, {"num_warps": splice.NUM_WARPS}


def cases(capability):
    """All that is shipped for ``capability`` (80, 90, 100)."""
    path = "tma" if capability // 10 in (9, 10) else "pointer"
    yield from pool_cases()
    yield from elementwise_cases()
    for dtype in ("bf16", "fp16"):
        yield from gated_cases(path, dtype)
        yield from dgated_cases(path, dtype)


def main(capability, wanted=""):
    for name, kernel, signature, constants, options in cases(capability):
        if wanted in name:
            programs = options.pop("programs_per_sm", 1)
            compiled = compile_for(kernel, signature, constants, capability, enable_fp_fusion=True, **options)
            print(json.dumps({"name": name, "programs_per_sm": programs} | measure(compiled)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
