"""An estimate as a page of text."""

from collections.abc import Iterator, Sequence

from .costs import Estimate
from .memory import Memory

CAUSES = {
    "weights": "weights",
    "gradients": "gradients",
    "master": "fp32 weights",
    "moments": "moments",
    "average": "average of weights",
    "gathered": "gathered weights",
    "activations": "activations",
    "logits": "logits and loss",
    "update": "the update's own",
    "buffers": "DeepSpeed's buffers",
    "reserved": "CUDA, NCCL (assumed)",
}
"""Figures of `Memory` in the order of the table, and their names there."""


def describe(estimate: Estimate) -> str:
    """The estimate in words and tables."""
    blocks = (_head, _parts, _step, _memory, _flops, _times)
    return "\n".join(line for block in blocks for line in block(estimate))


def _head(estimate: Estimate) -> Iterator[str]:
    micro = "1 micro-step" if estimate.num_micro_steps == 1 else f"{estimate.num_micro_steps} micro-steps"
    yield f"estimate    {estimate.name} on {estimate.num_gpus} x {estimate.gpu.name}, {estimate.precision}, ZeRO stage {estimate.stage}, {micro} per step"
    yield from (f"note        {note}" for note in estimate.notes)


def _parts(estimate: Estimate) -> Iterator[str]:
    yield ""
    yield _row("parameters, millions", ("all", "trained"))
    for part, size in estimate.parts.items():
        yield _row(f"  {part}", (_millions(size.parameters), _millions(size.trained)))
    sizes = estimate.parts.values()
    totals = sum(size.parameters for size in sizes), sum(size.trained for size in sizes)
    yield _row("  total", tuple(map(_millions, totals)))


def _step(estimate: Estimate) -> Iterator[str]:
    step, worst = estimate.workload.step, estimate.micro_batch
    yield ""
    yield f"step        {step.tokens:,.0f} tokens, {step.tiles:,.0f} tiles ({step.visual_tokens:,.0f} visual tokens), {step.learned_tokens:,.0f} learned, {step.samples:,.0f} samples"
    yield f"from        {estimate.workload.source}"
    yield f"worst       micro-batch: {worst.tokens:,} tokens, {worst.tiles} tiles at {worst.count} visual tokens, {worst.learned:,} learned"


def _memory(estimate: Estimate) -> Iterator[str]:
    yield ""
    own = [f"ZeRO {memory.stage}{' *' if memory.stage == estimate.stage else ''}" for memory in estimate.memory]
    yield _row("GB per GPU", own)
    for cause, name in CAUSES.items():
        values = [memory.by_cause()[cause] for memory in estimate.memory]
        if any(values):
            yield _row(f"  {name}", [_gb(value) for value in values])
    yield _row("  at most", [_gb(memory.total) for memory in estimate.memory])
    yield _row(f"  of {estimate.gpu.memory / 1e9:.0f}", [_fits(memory, estimate) for memory in estimate.memory])
    if any(memory.host for memory in estimate.memory):
        yield _row("  offloaded, per GPU", [_gb(memory.host) for memory in estimate.memory])
    acts = estimate.activations
    how = "recomputed" if estimate.recomputes else "kept"
    other = ("kept", acts.kept) if estimate.recomputes else ("recomputed", acts.recomputed)
    yield f"* the recipe's. Activations {how}, as the recipe says (model.gradient_checkpointing); {other[0]} they are {_gb(other[1])} GB. Loss {'fused' if acts.is_loss_fused else 'plain'}."
    yield "The update comes when activations are gone: the larger of both counts."


def _fits(memory: Memory, estimate: Estimate) -> str:
    return "fits" if memory.total <= estimate.gpu.memory else "too much"


def _flops(estimate: Estimate) -> Iterator[str]:
    yield ""
    yield _row("TFLOP per step", ("forward", "in all", "share"))
    for cause, passes in estimate.flops.items():
        share = passes.total / max(estimate.step_flops, 1.0)
        yield _row(f"  {cause}", (_tera(passes.forward), _tera(passes.total), f"{100 * share:.1f} %"))
    forward = sum(passes.forward for passes in estimate.flops.values())
    yield _row("  total", (_tera(forward), _tera(estimate.step_flops), ""))


def _times(estimate: Estimate) -> Iterator[str]:
    assumed = estimate.assumptions
    yield ""
    yield f"time        {_duration(estimate.step_s)} a step, {_duration(estimate.run_s)} for {estimate.num_steps:,} steps: at {100 * assumed.mfu:.0f} % MFU (assumed) of {estimate.gpu.flops / 1e12:,.0f} TFLOP/s"
    yield f"checkpoint  {_gb(estimate.checkpoint_bytes)} GB, {_duration(estimate.checkpoint_s)} to write at {assumed.write_gb_s:g} GB/s (assumed) while training goes on; the exported model {_gb(estimate.export_bytes)} GB"


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<24s}" + "".join(f"{cell:>12s}" for cell in cells)


def _millions(number: float) -> str:
    return f"{number / 1e6:,.2f}" if number else "-"


def _gb(number: float) -> str:
    value = number / 1e9
    return "-" if not number else f"{value:,.1f}" if value >= 1 else f"{value:.3f}"


def _tera(number: float) -> str:
    value = number / 1e12
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.3g} {name}"
    return f"{seconds / 86400:.1f} days"
