"""The code-generation gate: every shipped configuration compiled for three generations of GPU, with none present.

Compiled in subprocesses (an invalid configuration can abort the process) by the tool chain in Triton's wheel.
"""

import json

import kernel_process
import pytest

triton = pytest.importorskip("triton")

# What a thread block may use; on 8.0 the tighter limit of 8.6 and 8.9, which run the same configurations.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# m64n256k16 does gate and up of a 128-column tile in one instruction.
WGMMA = {
    "gated tma-128x128x64-w8s4": "m64n256k16",
    "gated tma-128x64x64-w8s3": "m64n128k16",
    "gated tma-64x128x64-w4s4": "m64n256k16",
    "dgated tma-128x128x64-w8s4": "m64n128k16",
    "dgated tma-256x128x64-w8s3": "m64n128k16",
    "dgated tma-64x128x64-w4s4": "m64n128k16",
}


LAUNCHED = (80, 90)


@pytest.fixture(scope="module")
def outputs():
    """(program, compute capability) -> what it will have printed."""
    jobs = {("codegen", capability): (("kernel_codegen.py", capability), {}) for capability in sorted(SHARED_BYTES)}
    jobs |= {("launch", capability): (("kernel_launch.py", capability), {}) for capability in LAUNCHED}
    with kernel_process.side_by_side(jobs) as outputs:
        yield outputs


@pytest.fixture(scope="module", params=sorted(SHARED_BYTES))
def generation(request, outputs):
    """(compute capability, what was generated for every shipped configuration)."""
    output = outputs["codegen", request.param].result()
    compiled = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return request.param, compiled


def of(compiled, kind):
    found = [entry for entry in compiled if entry["name"].split()[0] == kind]
    assert found
    return found


def kinds(generation):
    """What has tiles of a product: one launch only where there are descriptors."""
    return ("gated", "dgated", "fused") if generation[0] >= 90 else ("gated", "dgated")


def test_every_configuration_is_compiled(generation):
    from tokenflex_kernels import fused, gated, pool

    capability, compiled = generation
    path = "pointer" if capability < 90 else "tma"
    names = {tuple(entry["name"].split()[1:3]) for entry in of(compiled, "pool")}
    for way in ("pool", "backward", "pool+norm", "pool+norm-inference", "norm"):
        wanted = [pool.name_of(config) for config in pool.CONFIGS if not (config.span and "norm" in way)]
        assert {(way, name) for name in wanted} <= names
    assert len(of(compiled, "gated")) == 2 * (len(gated.configs_for(gated.GATED_CONFIGS, path, capability)) + 1)
    assert len(of(compiled, "dgated")) == 2 * (len(gated.configs_for(gated.DGATED_CONFIGS, path, capability)) + 1)
    assert len(of(compiled, "elementwise")) == 6
    if path == "tma":
        assert len(of(compiled, "fused")) == 3 * (len(fused.CONFIGS) + 1)


def test_nothing_spills_and_everything_fits(generation):
    capability, compiled = generation
    for entry in compiled:
        assert entry["spills"] == entry["spilled_bytes"] == 0, entry
        assert entry["shared_bytes"] <= SHARED_BYTES[capability], entry
        assert entry["registers"] * entry["num_warps"] * 32 <= 65536, entry
        assert (entry["atomics"] > 0) is entry["name"].startswith("fused"), entry
        if capability == 90 and entry["programs_per_sm"] == 2:  # 9.0 is where these were shaped: two must fit
            assert 2 * entry["registers"] * entry["num_warps"] * 32 <= 65536, entry
            assert 2 * (entry["shared_bytes"] + 1024) <= 228 * 1024, entry


def test_memory_is_moved_16_bytes_at_a_time(generation):
    compiled = generation[1]
    for entry in of(compiled, "pool"):
        way, width = entry["name"].split()[1:3]
        # a width of 1152 is two pieces, a span of 128 one; all five cells of a line are read side by side
        pieces, cells = 1 if "x128" in width else 2, {"backward": 2, "norm": 1}.get(way, 5)
        assert entry["loads_16_bytes"] >= pieces * cells, entry
        outputs = 2 if way in ("pool+norm", "norm") else 1
        assert entry["stores_16_bytes"] >= pieces * outputs, entry
    for entry in of(compiled, "elementwise"):
        assert entry["loads_16_bytes"] >= 1 and entry["stores_16_bytes"] >= 1, entry
    for kind in kinds(generation):
        for entry in of(compiled, kind):
            if "tma" in entry["name"]:
                assert entry["descriptor_loads"] >= 2 and entry["descriptor_stores"] >= 1, entry
            else:
                assert entry["copies"] == entry["copies_16_bytes"] > 0, entry  # asynchronous, into shared memory
                assert entry["stores_16_bytes"] >= 4, entry


def test_one_box_carries_gate_and_up(generation):
    """Each strip of the gradient's epilogue reads once and stores twice (dG with dU, and S)."""
    capability, compiled = generation
    if capability == 90:
        (entry,) = (e for e in compiled if e["name"] == "dgated tma-128x128x64-w8s4 bf16 inner=True")
        assert entry["descriptor_stores"] == 4 and entry["instructions"] < 3600 and entry["barriers"] < 80, entry


def test_one_launch_orders_what_it_writes_before_what_it_reads(generation):
    """Rows, fence, barrier, release; acquire, fence, and only then the descriptors' loads."""
    if "fused" not in kinds(generation):
        assert not any(entry["name"].startswith("fused") for entry in generation[1])
        return
    for entry in of(generation[1], "fused"):
        order = entry["order"]
        steps = [name for name in order if name in ("ticket", "release", "acquire", "fence")]
        assert steps == ["ticket", "fence", "release", "release", "ticket", "acquire", "acquire", "acquire", "fence"], (
            entry
        )
        first_release, last_fence = order.index("release"), len(order) - 1 - order[::-1].index("fence")
        written = order[:first_release]
        assert "store" in written and "barrier" in written[written.index("fence") :], entry
        assert "store" not in written[written.index("fence") :], entry
        assert "descriptor" not in order[:last_fence] and "descriptor" in order[last_fence:], entry


def test_a_sigmoid_is_computed_once(generation):
    """One exponential and one reciprocal per element, but for those of the persistent loop's integer divisions.

    Triton before 3.9 computes again what two layouts need, so there the gradient that also stores S has two.
    """
    _, compiled = generation
    keeps = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    for kind in kinds(generation):
        for entry in of(compiled, kind):
            rows, columns = map(int, entry["name"].split()[1].split("-")[1].split("x")[:2])
            per_thread = rows * columns // (32 * entry["num_warps"])
            if kind == "dgated" and "inner=True" in entry["name"] and (rows == 256 or not keeps):
                # of 256 rows there are no registers to keep it in
                assert per_thread <= entry["exponentials"] <= 2 * per_thread, entry
                continue
            assert entry["exponentials"] == per_thread, entry
            assert kind == "fused" or per_thread <= entry["reciprocals"] <= per_thread + 8, entry


def test_the_matrix_units_are_the_generations_own(generation):
    capability, compiled = generation
    for kind in kinds(generation):
        for entry in of(compiled, kind):
            if capability == 80:
                assert entry["hmma"] > 0, entry
            elif capability == 90:
                kernel = " ".join(entry["name"].replace("fused", "gated").split()[:2])
                assert entry["wgmma"] == [WGMMA[kernel]], entry
                assert entry["pipelined"] and entry["hmma"] == 0, entry
            else:
                assert entry["tcgen05"] and entry["hmma"] == 0, entry


@pytest.mark.parametrize("capability", LAUNCHED)
def test_the_launchers_own_calls_compile(capability, outputs):
    """Through Triton's launch path: bound, specialised and compiled as on a GPU, short of the launch itself."""
    output = outputs["launch", capability].result()
    assert int(output.splitlines()[-1]) == (42 if capability >= 90 else 36)
