"""Compile Triton kernels for a GPU that is not here, and count what matters in the machine code.

Triton's wheel holds the whole tool chain (ptxas, cuobjdump, nvdisasm): no GPU, driver or CUDA toolkit is needed. An
invalid configuration can abort the process, so the tests run this file as a subprocess: ``python kernel_codegen.py 90``
prints one JSON object per shipped configuration.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
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
    """Registers, shared memory and counts of instructions of a compiled kernel.

    Registers and the stack that spills go to are the assembler's own account of the binary that would be launched, and
    the disassembly is the whole of it: Triton's own listing of some releases stops at 4,096 instructions.
    """
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        used = call("cuobjdump", "-res-usage", cubin.name)
        sass = call("cuobjdump", "-sass", cubin.name)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.MULTILINE)
    count = lambda pattern: sum(bool(re.search(pattern, line)) for line in instructions)  # noqa: E731
    return {
        "registers": int(re.search(r"\bREG:(\d+)", used)[1]),
        "spilled_bytes": int(re.search(r"\bSTACK:(\d+)", used)[1]) + int(re.search(r"\bLOCAL:(\d+)", used)[1]),
        "spills": count(r"\b(?:STL|LDL)\b"),
        "instructions": len(instructions),
        "barriers": count(r"\bBAR\.SYNC"),
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
        "exponentials": count(r"\bMUFU\.EX2"),
        "reciprocals": count(r"\bMUFU\.RCP"),
        "atomics": count(r"\b(?:ATOM|RED)G?\b"),
        "order": order(ptx),
        "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\S*?\.(m64n\d+k\d+)", ptx))),
        "tcgen05": "tcgen05.mma" in ptx,
        "pipelined": "wgmma.wait_group.sync.aligned 1" in ptx,
    }


ORDERED = {
    "ticket": r"\batom\S*\.relaxed\S*\.add",
    "release": r"\b(?:red|atom)\S*\.release\S*\.add",
    "acquire": r"\b(?:ld|atom)\S*\.acquire",
    "fence": r"\bfence\.proxy\.async\.global",
    "barrier": r"\bbar(?:rier)?\.(?:cta\.)?sync",
    "store": r"\bst\.global",
    "descriptor": r"\bcp\.async\.bulk\.tensor\S*\.shared\S*\.global",
}


def order(ptx):
    """In the order of the text, what programs that wait for each other do, by the names of ``ORDERED``; none without atomics."""
    if not re.search(ORDERED["release"], ptx):
        return []
    found = [next((name for name, way in ORDERED.items() if re.search(way, line)), None) for line in ptx.splitlines()]
    return [name for name in found if name]


def call(name, *arguments):
    """What a program of the tool chain in Triton's wheel prints."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


def _descriptor(dtype, *block):
    return f"tensordesc<{dtype}[{', '.join(map(str, block))}]>"


def pool_cases():
    """(name, kernel, signature, constants, options) of the pool at a width of 1152: every configuration that fits it."""
    from tokenflex_kernels import pool

    ways = {  # training's forward pass, inference's, pooling alone, its backward pass, LayerNorm alone
        "pool+norm": {"POOL": True, "TRANSPOSED": False, "NORM": True, "STORE_HAT": True, "CELLS": 5},
        "pool+norm-inference": {"POOL": True, "TRANSPOSED": False, "NORM": True, "STORE_HAT": False, "CELLS": 5},
        "pool": {"POOL": True, "TRANSPOSED": False, "NORM": False, "STORE_HAT": False, "CELLS": 5},
        "backward": {"POOL": True, "TRANSPOSED": True, "NORM": False, "STORE_HAT": False, "CELLS": 2},
        "norm": {"POOL": False, "TRANSPOSED": False, "NORM": True, "STORE_HAT": True, "CELLS": 1},
    }
    for way, constants in ways.items():
        for name, config in pool.candidates(1152, constants["NORM"])[:-1]:
            for dtype, is_resize in (("bf16", False), ("fp32", False), ("bf16", True)):
                if (dtype, is_resize) != ("bf16", False) and (config != pool.CONFIGS[0] or constants["NORM"]):
                    continue
                span = min(config.span or 1152, 1152)
                values = {"ROWS": config.rows, "SPAN": span, "RESIZE": is_resize and constants["POOL"]}
                values |= dict(zip(("P0", "P1", "P2"), pool.pieces_of(span)))
                values |= {"HAS_SCALE": constants["NORM"], "HAS_SHIFT": constants["NORM"]}
                signature = {
                    "source": f"*{dtype}",
                    "stride": "i32:16",
                    "out": f"*{dtype}",
                    "num_rows": "i32",
                    "channels": "i32:16",
                }
                signature |= {"num_images": "i32", "halvings": "i32", "eps": "fp32"}
                if constants["POOL"]:
                    signature["table"] = "*i32"
                if constants["NORM"]:
                    signature |= {"scale": f"*{dtype}", "shift": f"*{dtype}"}
                if constants["STORE_HAT"]:
                    signature |= {"hat": f"*{dtype}", "rstd": "*fp32"}
                yield (
                    f"pool {way} {name} {dtype} resize={is_resize}",
                    pool.pool_rows, signature, constants | values, {"num_warps": config.num_warps, "maxnreg": pool.MAX_REGISTERS},
                )  # fmt: skip


def gated_cases(path, dtype, capability):
    """Every shipped configuration of ``gated``, with and without what training stores; for float16 only the first."""
    from tokenflex_kernels import gated

    for config in gated.configs_for(gated.GATED_CONFIGS, path, capability)[: None if dtype == "bf16" else 1]:
        for training in (True, False):
            sizes = {"bias": f"*{dtype}", "M": "i32", "N": "i32:16", "K": "i32:16"}
            constants = {"BM": config.m, "BN": config.n, "BK": config.k, "GROUP": gated.GROUP_M, "HAS_BIAS": True, "STORE_INNER": True,
                             "STORE_GATE_UP": training}  # fmt: skip
            if path == "tma":
                kernel = gated.gated_tma
                constants["NUM_PROGRAMS"] = 132 * config.per_sm
                signature = dict(sizes, tokens=_descriptor(dtype, config.m, config.k),
                                 weight=_descriptor(dtype, 2, config.n, config.k),
                                 inner=_descriptor(dtype, config.m, 1, config.n))  # fmt: skip
                if training:
                    signature["gate_up"] = _descriptor(dtype, config.m, 1, config.n)
            else:
                kernel = gated.gated_pointer
                signature = dict(sizes, tokens=f"*{dtype}", weight=f"*{dtype}", inner=f"*{dtype}")
                if training:
                    signature["gate_up"] = f"*{dtype}"
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "programs_per_sm": config.per_sm}
            yield f"gated {gated.name_of(config)} {dtype} training={training}", kernel, signature, constants, options


def fused_cases(dtype):
    """Pooling, LayerNorm and ``gated`` in one launch, likewise; at a width of 1152, and at 3200 in the other mode."""
    from tokenflex_kernels import fused, gated, pool

    for config in fused.CONFIGS[: None if dtype == "bf16" else 1]:
        for training, is_resize, width in ((True, False, 1152), (False, False, 1152), (True, True, 3200)):
            signature = dict.fromkeys(("source", "rows", "scale", "shift", "bias"), f"*{dtype}")
            signature |= {"stride": "i32:16", "table": "*i32", "counters": "*i32", "eps": "fp32"}
            signature |= {"M": "i32", "num_images": "i32", "halvings": "i32", "K": "i32:16", "N": "i32:16"}
            signature |= {"tokens": _descriptor(dtype, config.m, config.k)}
            signature |= {"weight": _descriptor(dtype, 2, config.n, config.k)}
            signature |= {"inner": _descriptor(dtype, config.m, 1, config.n)}
            if training:
                signature |= {"hat": f"*{dtype}", "rstd": "*fp32", "gate_up": signature["inner"]}
            constants = dict(
                zip(("P0", "P1", "P2"), pool.pieces_of(width)), CELLS=5, RESIZE=is_resize, TRANSPOSED=False
            )
            constants |= dict.fromkeys(("POOL", "NORM", "HAS_SCALE", "HAS_SHIFT", "HAS_BIAS"), True)
            constants |= {
                "ROWS": fused.rows_per_ticket(config, width),
                "STORE_HAT": training,
                "STORE_GATE_UP": training,
            }
            constants |= {"BM": config.m, "BN": config.n, "BK": config.k, "GROUP": gated.GROUP_M, "NUM_PROGRAMS": 132}
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            name = f"fused {gated.name_of(config)} {dtype} training={training} width={width}"
            yield name, fused.pooled_gated_tma, signature, constants, options


def dgated_cases(path, dtype, capability):
    """Every shipped configuration of ``dgated``, with and without what a trained down projection needs; likewise."""
    from tokenflex_kernels import gated

    for config in gated.configs_for(gated.DGATED_CONFIGS, path, capability)[: None if dtype == "bf16" else 1]:
        for inner in (True, False):
            halves = _descriptor(dtype, config.m, 2, config.n // config.pieces)
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
                constants |= {"NUM_PROGRAMS": 132 * config.per_sm, "PIECES": config.pieces}
                signature = dict(sizes, d_out=_descriptor(dtype, config.m, config.k), weight=_descriptor(dtype, config.k, config.n),
                                 gate_up=halves, d_gate_up=halves)  # fmt: skip
                if inner:
                    signature["inner"] = _descriptor(dtype, config.m, config.n // config.pieces)
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
    from tokenflex_kernels import frozen, gated, pool, splice

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

    sizes = {"num_rows": "i32", "channels": "i32:16"}
    signature = dict(
        sizes, weight="*bf16", product="*bf16", row_sums="*fp32", scale="*bf16", shift="*bf16", sums="*fp32"
    )
    constants = {"ROWS": frozen.ROWS, "COLUMNS": frozen.COLUMNS, "TURNS": frozen.ROWS_PER_PROGRAM // frozen.ROWS}
    affine = {"HAS_SCALE": True, "HAS_SHIFT": True}
    yield (
        "elementwise weight_grads",
        frozen.weight_grads,
        signature,
        constants | affine,
        {"num_warps": frozen.NUM_WARPS},
    )
    signature = dict(sizes, hat="*bf16", scale="*bf16", shift="*bf16", out="*bf16")
    yield "elementwise affine_rows", pool.affine_rows, signature, {"ROWS": 8, "COLUMNS": 128} | affine, {"num_warps": 4}
    signature = dict(sizes, d_tokens="*bf16", hat="*bf16", rstd="*fp32", scale="*bf16", d_source="*bf16", sums="*fp32")
    constants = {"WIDTH": 2048, "HAS_SCALE": True, "STORE_GRAD": True, "SUMS": True}
    yield "elementwise norm_grad_rows", pool.norm_grad_rows, signature | {"rows": "i32"}, constants, {"num_warps": 4}


def cases(capability):
    """All that is shipped for ``capability`` (80, 90, 100)."""
    path = "tma" if capability // 10 in (9, 10) else "pointer"
    yield from pool_cases()
    yield from elementwise_cases()
    for dtype in ("bf16", "fp16"):
        yield from gated_cases(path, dtype, capability)
        yield from dgated_cases(path, dtype, capability)
        if path == "tma":
            yield from fused_cases(dtype)


def main(capability, wanted=""):
    for name, kernel, signature, constants, options in cases(capability):
        if wanted in name:
            programs = options.pop("programs_per_sm", 1)
            compiled = compile_for(kernel, signature, constants, capability, enable_fp_fusion=True, **options)
            print(json.dumps({"name": name, "programs_per_sm": programs} | measure(compiled)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
