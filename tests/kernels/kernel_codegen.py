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


NORM = {"scale": "*bf16", "shift": "*bf16", "eps": "fp32"}
KEPT = {"hat": "*bf16", "rstd": "*fp32"}


def pool_types(dtype, **more):
    types = {"source": f"*{dtype}", "out": f"*{dtype}", "stride": "i32:16", "num_rows": "i32", "channels": "i32:16"}
    return types | {"num_images": "i32", "halvings": "i32", "table": "*i32"} | more


def pieces(width):
    from tokenflex_kernels import pool

    return dict(zip(("P0", "P1", "P2"), pool.pieces_of(width)))


def pool_cases():
    """(name, kernel, signature, constants, options) of the pool at a width of 1152: every configuration that fits it."""
    from tokenflex_kernels import pool

    ways = {  # training's forward pass, inference's, pooling alone, its backward pass, LayerNorm alone
        "pool+norm": (5, NORM | KEPT),
        "pool+norm-inference": (5, NORM),
        "pool": (5, {}),
        "backward": (2, {}),
        "norm": (1, NORM | KEPT),
    }
    for way, (cells, more) in ways.items():
        for name, config in pool.candidates(1152, bool(more))[:-1]:
            for dtype, is_resize in (("bf16", False), ("fp32", False), ("bf16", True)):
                if (dtype, is_resize) != ("bf16", False) and (config != pool.CONFIGS[0] or more):
                    continue
                span = min(config.span or 1152, 1152)
                constants = {"ROWS": config.rows, "SPAN": span, "CELLS": cells, "RESIZE": is_resize}
                types = pool_types(dtype, **more)
                if way == "norm":
                    del types["table"]
                yield (
                    f"pool {way} {name} {dtype} resize={is_resize}", pool.pool_rows, types,
                    constants | pieces(span) | {"TRANSPOSED": way == "backward"},
                    {"num_warps": config.num_warps, "maxnreg": pool.MAX_REGISTERS},
                )  # fmt: skip


def tile_case(name, kernel, config, types, **constants):
    """A case of a kernel of tiles. ``types`` has what a descriptor's boxes are as (dtype, sizes)."""
    from tokenflex_kernels import gated

    options = gated.options_of(config)
    constants |= {name: options[name] for name in ("BM", "BN", "BK", "GROUP")}
    if config.path == "tma":
        constants |= {"NUM_PROGRAMS": 132 * config.per_sm}
    types = types | {"M": "i32", "N": "i32:16", "K": "i32:16"}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "programs_per_sm": config.per_sm}
    return name, kernel, types, constants, options


def operand(config, dtype, *block):
    """The type of a tensor that ``config``'s kernel takes as a descriptor of ``block``s, or by pointer."""
    return f"tensordesc<{dtype}[{', '.join(map(str, block))}]>" if config.path == "tma" else f"*{dtype}"


def gated_types(config, dtype, training):
    types = {"bias": f"*{dtype}", "tokens": operand(config, dtype, config.m, config.k)}
    types |= {"weight": operand(config, dtype, 2, config.n, config.k)}
    types |= {"inner": operand(config, dtype, config.m, 1, config.n)}
    return types | ({"gate_up": types["inner"]} if training else {})


def gated_cases(path, dtype, capability):
    """Every shipped configuration of ``gated``, with and without what training stores; for float16 only the first."""
    from tokenflex_kernels import gated

    kernel = gated.gated_tma if path == "tma" else gated.gated_pointer
    for config in gated.configs_for(gated.GATED_CONFIGS, path, capability)[: None if dtype == "bf16" else 1]:
        for training in (True, False):
            name = f"gated {gated.name_of(config)} {dtype} training={training}"
            yield tile_case(name, kernel, config, gated_types(config, dtype, training))


def fused_cases(dtype):
    """Pooling, LayerNorm and ``gated`` in one launch, likewise; at a width of 1152, and at 3200 in the other mode."""
    from tokenflex_kernels import fused, gated

    for config in fused.CONFIGS[: None if dtype == "bf16" else 1]:
        for training, is_resize, width in ((True, False, 1152), (False, False, 1152), (True, True, 3200)):
            norm = {name: kind.replace("bf16", dtype) for name, kind in (NORM | (KEPT if training else {})).items()}
            types = pool_types(dtype, rows=f"*{dtype}", counters="*i32", **norm) | gated_types(config, dtype, training)
            for absent in ("out", "num_rows", "channels"):
                del types[absent]
            constants = pieces(width) | {"CELLS": 5, "RESIZE": is_resize, "TRANSPOSED": False}
            constants |= {"ROWS": fused.rows_per_ticket(config, width)}
            name = f"fused {gated.name_of(config)} {dtype} training={training} width={width}"
            yield tile_case(name, fused.pooled_gated_tma, config, types, **constants)


def dgated_cases(path, dtype, capability):
    """Every shipped configuration of ``dgated``, with and without what a trained down projection needs; likewise."""
    from tokenflex_kernels import gated

    kernel = gated.dgated_tma if path == "tma" else gated.dgated_pointer
    for config in gated.configs_for(gated.DGATED_CONFIGS, path, capability)[: None if dtype == "bf16" else 1]:
        for inner in (True, False):
            strip = config.n // config.pieces
            types = {"bias_sums": "*fp32", "d_out": operand(config, dtype, config.m, config.k)}
            types |= {"weight": operand(config, dtype, config.k, config.n)}
            types |= dict.fromkeys(("gate_up", "d_gate_up"), operand(config, dtype, config.m, 2, strip))
            if inner:
                types["inner"] = operand(config, dtype, config.m, strip)
            constants = {"PIECES": config.pieces} if path == "tma" else {}
            name = f"dgated {gated.name_of(config)} {dtype} inner={inner}"
            yield tile_case(name, kernel, config, types, **constants)


def elementwise_cases():
    """The kernels with one configuration."""
    from tokenflex_kernels import frozen, gated, pool, splice

    rows, columns, num_warps = gated.ELEMENTWISE
    sizes, options = {"M": "i32", "N": "i32:16"}, {"num_warps": num_warps}
    constants = {"ROWS": rows, "COLUMNS": columns}
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
    constants = {"ROWS": splice.ROWS, "COLUMNS": splice.COLUMN_BYTES // 2}
    yield "elementwise route_rows", splice.route_rows, signature, constants, {"num_warps": splice.NUM_WARPS}

    sizes = {"num_rows": "i32", "channels": "i32:16"}
    signature = dict(
        sizes, weight="*bf16", product="*bf16", row_sums="*fp32", scale="*bf16", shift="*bf16", sums="*fp32"
    )
    constants = {"ROWS": frozen.ROWS, "COLUMNS": frozen.COLUMNS, "TURNS": frozen.ROWS_PER_PROGRAM // frozen.ROWS}
    yield "elementwise weight_grads", frozen.weight_grad_rows, signature, constants, {"num_warps": frozen.NUM_WARPS}
    signature = dict(sizes, hat="*bf16", scale="*bf16", shift="*bf16", out="*bf16")
    yield "elementwise affine_rows", pool.affine_rows, signature, {"ROWS": 8, "COLUMNS": 128}, {"num_warps": 4}
    signature = dict(sizes, d_tokens="*bf16", hat="*bf16", rstd="*fp32", scale="*bf16", d_source="*bf16", sums="*fp32")
    constants = {"WIDTH": 2048}
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
