"""What is compared: each arm is the base recipe with a few keys overridden, trained by the trainer like any other run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..config import RunConfig
from ..errors import UserError

Budgeted = Literal["samples", "tokens"]
"""What an arm has as much of as the flexible one: samples seen, or tokens through the language model."""
FLEXIBLE = "flexible"
CONSISTENCY = 0.3
"""Weight of the divergence in the arm that has one."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    overrides: dotted keys of the recipe and their values. equal: what it has as much of as the flexible arm. specialist: the
    one count it is trained at, if it is a specialist. counts: where it is evaluated. without_images: it is trained and
    asked without the images.
    """

    name: str
    title: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    equal: Budgeted = "samples"
    specialist: int | None = None
    counts: tuple[int, ...] = ()
    without_images: bool = False

    def settings(self, num_steps: int, seed: int, name: str) -> list[str]:
        """The overrides of one run, as the command line takes them."""
        settings = {"name": name, "train.seed": seed, "train.num_steps": num_steps, **self.overrides}
        settings["evaluate.num_visual_tokens"] = list(self.counts)
        return [f"{key}={_as_yaml(value)}" for key, value in settings.items()]


def _as_yaml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_as_yaml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def core_arms(recipe: RunConfig) -> list[Arm]:
    """The flexible arm and, under both protocols, a specialist for each of its counts."""
    counts, asked = recipe.budget.num_visual_tokens, recipe.evaluate.num_visual_tokens
    arms = [Arm(name=FLEXIBLE, title=f"flexible {_shares(recipe)}", counts=asked)]
    for equal in ("samples", "tokens"):
        arms += [
            Arm(
                name=f"fixed-{count}" + ("" if equal == "samples" else "-equal-tokens"),
                title=f"fixed at {count}, equal {equal}",
                overrides=_one_count(count),
                equal=equal,  # type: ignore[arg-type]  # one of the two
                specialist=count,
                counts=asked,
            )
            for count in counts
        ]
    return arms


def further_arms(recipe: RunConfig, patch: int) -> list[Arm]:
    """Other ways to be flexible, and baselines; samples as the flexible arm has. `patch` is the side of the encoder's, in pixels."""
    counts, asked = recipe.budget.num_visual_tokens, recipe.evaluate.num_visual_tokens
    num_samples = recipe.train.num_steps * recipe.data.packs_per_step * recipe.data.max_images_per_pack
    small, large = _leaning(len(counts)), _leaning(len(counts))[::-1]
    views = {"data.pack_length": recipe.data.pack_length * (len(counts) + 1)}
    arms: list[tuple[str, str, dict[str, Any]]] = [
        ("uniform", "uniform per batch", {"budget.probabilities": [1] * len(counts)}),
        ("per-sample", "drawn per sample", {"data.mixing": "free"}),
        ("detail", "with the windows' largest values", {"model.pooling_detail": "max"}),
        ("all", "all counts of each sample (M3)", {"budget.per_sample": "all", **views}),
        (
            "largest-and-one",
            "largest and one, KL to the largest (ViCO)",
            {"budget.per_sample": "largest_and_one", "train.consistency": CONSISTENCY, **views},
        ),
        ("small-to-large", "small counts first", {"budget.schedule": [[0, small], [num_samples, large]]}),
        ("large-to-small", "large counts first", {"budget.schedule": [[0, large], [num_samples, small]]}),
    ]
    flexible = [Arm(name=name, title=title, overrides=keys, counts=asked) for name, title, keys in arms]
    return [*flexible, *_smaller_images(recipe, patch), _without_images(recipe)]


def _smaller_images(recipe: RunConfig, patch: int) -> list[Arm]:
    """Images scaled down until the encoder itself gives so many tokens."""
    return [
        Arm(
            name=f"small-image-{count}",
            title=f"image scaled down to {count} patches",
            overrides={**_one_count(count), "model.image_size": [patch * round(count**0.5)] * 2},
            counts=(count,),
        )
        for count in recipe.budget.num_visual_tokens
    ]


def _without_images(recipe: RunConfig) -> Arm:
    counts = recipe.budget.num_visual_tokens
    return Arm(
        name="no-image",
        title="no image",
        overrides=_one_count(min(counts)),
        counts=(min(counts),),
        without_images=True,
    )


def _one_count(count: int) -> dict[str, Any]:
    return {"budget.num_visual_tokens": [count], "budget.probabilities": [1]}


def _leaning(number: int) -> list[float]:
    """Shares that fall from the first to the last: 4 : 2 : 1 for three."""
    shares = [2.0 ** (number - 1 - place) for place in range(number)]
    return [round(share / sum(shares), 6) for share in shares]


def _shares(recipe: RunConfig) -> str:
    if len(set(recipe.budget.probabilities)) == 1:
        return "in equal shares"
    return " : ".join(f"{10 * share:g}" for share in recipe.budget.probabilities)


def chosen(arms: Sequence[Arm], names: Sequence[str]) -> list[Arm]:
    """The arms of these names.

    Raises:
        UserError: a name that no arm has.
    """
    by_name = {arm.name: arm for arm in arms}
    unknown = sorted(set(names) - by_name.keys())
    if unknown:
        raise UserError(f"--arms: there is no arm {unknown[0]!r}; known are core, all, {', '.join(by_name)}")
    return [by_name[name] for name in names]
