"""How a run scales: its plan at every number of ranks, what its packs cost, and what ranks wait and send for it.

A cost model, calibrated by what is handed in (`Costs`); no step is run. Under ZeRO-3 ranks meet in every layer, so each micro-step
lasts as long as its slowest encoder and its slowest language model together; under stage 2 they meet once per micro-step, below
once per step. The plan is the real one: the same packs, in the same rows, that a run would have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np

from ..budget import VisualTokenBudget
from ..config import DataConfig, RunConfig
from ..errors import UserError
from ..plan import Lengths, Mixture, Planner, Source
from ..plan.balance import MAX_LEFT_OVER
from ..plots import new_figure
from .gpus import Gpu
from .memory import ModelSizes
from .network import Network
from .trace import UnitCosts
from .workload import Packs, packs_of, resampled

PHASES = ("vision", "language", "waiting", "communication", "data")
"""What a step's time is spent on; together they are all of it."""
DECODE_S = 0.002
"""Core-seconds to decode and cut one tile: of the order of `docs/results/decode.json`; assumed."""
COLUMNS = tuple(Packs.__annotations__)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of a rank for each of what packs hold, forward and backward pass.

    micro_step, step: once per micro-step and per update, whatever they hold. decode: core-seconds of a loading process per tile.
    """

    tile: float
    visual_token: float
    token: float
    pair: float
    learned_token: float
    micro_step: float = 0.0
    step: float = 0.0
    decode: float = DECODE_S

    @classmethod
    def of_gpu(cls, units: UnitCosts, gpu: Gpu, mfu: float, recomputes: bool) -> "Costs":
        """On a GPU that reaches `mfu` of its peak while it computes; recomputation runs the forward pass once more."""
        rate = gpu.flops * mfu

        def seconds(name: str) -> float:
            passes = getattr(units, name)
            return (passes.total + recomputes * passes.forward * (passes.total > passes.forward)) / rate

        return cls(**{name: seconds(name) for name in ("tile", "visual_token", "token", "pair", "learned_token")})

    def vision(self, packs: Packs) -> np.ndarray:
        """Seconds of encoder and projector: [packs]."""
        return self.tile * packs.tiles + self.visual_token * packs.visual_tokens

    def language(self, packs: Packs) -> np.ndarray:
        """Seconds of the language model: [packs]."""
        return self.token * packs.tokens + self.pair * packs.pairs + self.learned_token * packs.learned_tokens


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What ranks send: bytes per micro-step and per update over all ranks, and in how many collectives."""

    per_micro_step: float
    per_step: float
    collectives_per_micro_step: float
    collectives_per_step: float

    @classmethod
    def of(cls, sizes: ModelSizes, ds_config: Mapping[str, Any], stage: int, num_layers: int) -> "Traffic":
        """Of a model at a ZeRO stage: stage 3 gathers weights twice per micro-step and spreads gradients, stage 2 spreads them, below
        all is reduced once per step; stages 1 and 2 gather what was updated."""
        zero = ds_config.get("zero_optimization", {})
        trained, b = sizes.trained * sizes.itemsize, sizes.itemsize
        buckets = max(1.0, sizes.trained / float(zero.get("reduce_bucket_size", 500_000_000)))
        if stage == 3:
            gathered = 2 * (sizes.total - sizes.small) * b
            return cls(
                per_micro_step=gathered + trained,
                per_step=0.0,
                collectives_per_micro_step=2 * num_layers + buckets,
                collectives_per_step=0.0,
            )
        if stage == 2:
            return cls(
                per_micro_step=trained, per_step=trained, collectives_per_micro_step=buckets, collectives_per_step=1
            )
        return cls(
            per_micro_step=0.0, per_step=2 * trained, collectives_per_micro_step=0.0, collectives_per_step=2 * buckets
        )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is simulated besides the plan. num_workers: loading processes per rank. flops: of the GPU, for the MFU."""

    costs: Costs
    units: UnitCosts
    traffic: Traffic
    network: Network
    stage: int
    num_workers: int
    packs_per_micro_batch: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A run at one number of ranks. step_s: mean seconds of a step. phases: seconds of it, by `PHASES`. fill: of the packs' tokens."""

    num_ranks: int
    packs_per_step: int
    step_s: float
    phases: dict[str, float]
    mfu: float
    tokens_per_s: float
    fill: float

    def share(self, phase: str) -> float:
        """Of the step's time."""
        return self.phases[phase] / self.step_s

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "shares": {phase: self.share(phase) for phase in PHASES}}


def simulate(config: RunConfig, lengths: Sequence[Lengths], setting: Setting, ranks: Sequence[int]) -> list[Scale]:
    """A `Scale` for each number of ranks.

    Where the ranks do not divide the recipe's `data.packs_per_step`, a step has one pack per rank, and `data.lockstep_packs` is as
    many. Where the samples are too few for that plan they are drawn anew from those there are.

    Raises:
        UserError: a plan that cannot be.
    """
    return [
        scale_of(planned_packs(config, lengths, number), data_for(config.data, number), setting, number)
        for number in ranks
    ]


def check_ranks(ranks: Sequence[int]) -> None:
    """That numbers of ranks can be simulated.

    Raises:
        UserError: one is below 1.
    """
    if not ranks or min(ranks) < 1:
        raise UserError(f"--ranks {','.join(map(str, ranks))}: wanted whole numbers above 0, separated by commas")


def data_for(data: DataConfig, num_ranks: int) -> DataConfig:
    """The data section for so many ranks: the recipe's where they divide a step, else a pack per rank."""
    if data.packs_per_step % num_ranks == 0:
        return data
    return data.model_copy(update={"packs_per_step": num_ranks, "lockstep_packs": num_ranks})


def planned_packs(config: RunConfig, lengths: Sequence[Lengths], num_ranks: int) -> Packs:
    """Packs of whole steps, in planned order: of the plan's first window at this number of ranks."""
    data = data_for(config.data, num_ranks)
    budget = VisualTokenBudget.of(config.budget)
    table = resampled(list(lengths), num_samples_for(lengths, data, budget), config.train.seed)
    source = Source(index=table, name="the samples", over_long="drop")
    planner = Planner(Mixture([source]), budget, data, config.train.seed, config.train.loss_weighting)
    for _, window, _ in planner.windows(0):
        packs = packs_of(window, budget)
        whole = window.num_packs // data.packs_per_step * data.packs_per_step
        if whole:
            return Packs(**{name: getattr(packs, name)[:whole] for name in COLUMNS})
    raise UserError(
        f"simulate: the samples fill no step of {data.packs_per_step} packs; give more of them (--lengths, --index)"
    )


def num_samples_for(lengths: Sequence[Lengths], data: DataConfig, budget: VisualTokenBudget) -> int:
    """Samples that fill the first window of a plan, with a margin."""
    text = np.concatenate([np.asarray(table.text_tokens, np.float64) for table in lengths])
    tiles = np.concatenate([np.asarray(table.num_tiles, np.float64) for table in lengths])
    at_counts = [
        budget.visual_tokens(budget.within_total(np.full_like(tiles, count), tiles)) for count in budget.counts
    ]
    count = np.dot(budget.probabilities, at_counts)
    per_pack = data.pack_length / max(float(budget.tokens(text, tiles, count).mean()), 1.0)
    window = max(data.window_rows * data.lockstep_packs, 512, data.packs_per_step)
    return int(2.2 * window * max(per_pack, 1.0)) + MAX_LEFT_OVER


def scale_of(packs: Packs, data: DataConfig, setting: Setting, num_ranks: int) -> Scale:
    """The `Scale` of whole planned steps."""
    at_once = min(setting.packs_per_micro_batch, data.packs_per_step // num_ranks)
    costs, traffic, network = setting.costs, setting.traffic, setting.network

    def by_rank(values: np.ndarray) -> np.ndarray:
        """[packs] -> [steps, micro-steps, ranks]."""
        micro = data.packs_per_step // (num_ranks * at_once)
        return values.reshape(-1, micro, num_ranks, at_once).sum(axis=-1)

    vision, language = by_rank(costs.vision(packs)), by_rank(costs.language(packs))
    computed = busy(vision, language, setting.stage) + costs.micro_step * vision.shape[1]
    sent = vision.shape[1] * network.seconds(traffic.per_micro_step, num_ranks, traffic.collectives_per_micro_step)
    sent += network.seconds(traffic.per_step, num_ranks, traffic.collectives_per_step)
    exposed = np.maximum(sent - network.overlap * computed, 0.0)
    lasted = computed + exposed + costs.step
    decoded = by_rank(packs.tiles).sum(axis=1).max(axis=-1) * costs.decode / max(setting.num_workers, 1)
    data_wait = np.maximum(decoded - lasted, 0.0)
    step_s = float((lasted + data_wait).mean())
    alone = float(vision.mean(axis=2).sum(axis=1).mean()), float(language.mean(axis=2).sum(axis=1).mean())
    fixed = costs.micro_step * vision.shape[1] + costs.step
    phases = {
        "vision": alone[0],
        "language": alone[1] + fixed,
        "waiting": float(busy(vision, language, setting.stage).mean()) - sum(alone),
        "communication": float(exposed.mean()),
        "data": float(data_wait.mean()),
    }
    num_steps = len(packs.tokens) / data.packs_per_step
    work = {name: float(getattr(packs, name).sum()) / num_steps for name in COLUMNS if name != "samples"}
    flops = sum(passes.total for passes in setting.units.of(**work).values())
    return Scale(
        num_ranks=num_ranks,
        packs_per_step=data.packs_per_step,
        step_s=step_s,
        phases=phases,
        mfu=flops / (step_s * num_ranks * setting.flops) if setting.flops else 0.0,
        tokens_per_s=work["tokens"] / step_s,
        fill=work["tokens"] / (data.packs_per_step * data.pack_length),
    )


def busy(vision: np.ndarray, language: np.ndarray, stage: int) -> np.ndarray:
    """Seconds that each step computes or waits for who does: [steps, micro-steps, ranks] twice -> [steps]."""
    if stage == 3:
        return (vision.max(axis=2) + language.max(axis=2)).sum(axis=1)
    if stage == 2:
        return (vision + language).max(axis=2).sum(axis=1)
    return (vision + language).sum(axis=1).max(axis=1)


def fitted(packs: Packs, seconds: np.ndarray, **others: float) -> Costs:
    """The `Costs` that explain measured micro-steps best, none below zero: packs that were run, and how long each took [packs].

    Relative errors are made small, by least squares; a cost that would be negative is left out. `others` are taken as given.
    """
    names = ["tile", "token", "pair", "learned_token", "micro_step"]
    columns = [packs.tiles, packs.tokens, packs.pairs, packs.learned_tokens, np.ones_like(packs.tokens)]
    table = np.stack(columns, axis=1) / seconds[:, None]
    scale = np.abs(table).max(axis=0)
    kept = list(range(len(names)))
    while True:
        found, *_ = np.linalg.lstsq(table[:, kept] / scale[kept], np.ones(len(seconds)), rcond=None)
        if found.min() >= 0:
            break
        kept.pop(int(found.argmin()))
    costs = dict.fromkeys(names, 0.0) | {names[place]: float(value / scale[place]) for place, value in zip(kept, found)}
    return Costs(visual_token=0.0, **costs, **others)


def describe(scales: Sequence[Scale], setting: Setting, what: str) -> str:
    """A table, a line for each number of ranks."""
    heads = "".join(f"{phase:>15s}" for phase in PHASES)
    network = setting.network
    lines = [
        f"simulate    {what}, ZeRO stage {setting.stage}, network {network.name}: a cost model over the real plan, no step was run",
        f"{'ranks':>6s}{'packs':>7s}{'step, s':>9s}{'MFU':>8s}{'tokens/s':>13s}{'fill':>8s}{heads}",
    ]
    for scale in scales:
        shares = "".join(f"{100 * scale.share(phase):>13.1f} %" for phase in PHASES)
        lines.append(
            f"{scale.num_ranks:>6d}{scale.packs_per_step:>7d}{scale.step_s:>9.3g}{100 * scale.mfu:>6.1f} %{scale.tokens_per_s:>13,.0f}"
            f"{100 * scale.fill:>6.1f} %{shares}"
        )
    return "\n".join(lines)


def plot(scales: Sequence[Scale], path: str | PathLike, what: str) -> None:
    """Draw where a step's time goes over the number of ranks, and the MFU, to a file (SVG or PNG by its name).

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    places, base = np.arange(len(scales)), np.zeros(len(scales))
    for phase, color in zip(PHASES, ("#4477aa", "#66ccee", "#ddaa33", "#cc3311", "#999999")):
        values = np.array([100 * scale.share(phase) for scale in scales])
        axes.bar(places, values, bottom=base, color=color, label=phase, width=0.7)
        base += values
    for place, scale in zip(places, scales):
        axes.text(place, 101, f"{100 * scale.mfu:.0f} %\n{scale.step_s:.3g} s", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(places, [f"{scale.num_ranks:,}" for scale in scales])
    axes.set(xlabel="ranks", ylabel="share of a step's time, %", ylim=(0, 114))
    axes.set_title(f"{what}: MFU and seconds of a step above each bar", fontsize=10)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}; wanted a file ending in .svg or .png that can be written") from None
