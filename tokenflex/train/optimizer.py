"""Which parameters are trained, in which groups, and optimizers that can be kept from running."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..config import OptimizerConfig
from ..errors import UserError

PARTS = {"vision": "vision_tower.", "projector": "projector.", "text": "language_model."}
"""Part of the configuration -> prefix of its parameters' names."""
ADAPTER = ".lora_"
"""In the names of an adapter's parameters."""
MUON_SIZE = 0.2
"""Root mean square of AdamW's updates, which Muon's are brought to (Moonlight, arXiv 2502.16982, section 2.2)."""
MapMatrices = Callable[
    [Sequence[torch.nn.Parameter], torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], None
]
"""See `parallel.Engine.map_matrices`."""


class VetoableAdamW(torch.optim.AdamW):
    """AdamW that asks before it runs: where `should_skip()` says so, weights, moments and count stay as they are.

    The question comes at the one moment when the step's gradient norm is known and nothing has moved yet, whatever wraps
    the optimizer.
    """

    def __init__(self, params: Iterable, should_skip: Callable[[], bool], **settings: Any):
        self._should_skip = should_skip
        super().__init__(params, **settings)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the weights, unless told not to."""
        return None if self._should_skip() else super().step(closure)


class VetoableOrthogonal(VetoableAdamW):
    """Muon for the groups that have a `muon_momentum`, AdamW for the others.

    Its momentum is the state that AdamW calls `exp_avg`; there is no second moment. (DeepSpeed takes an optimizer for its own
    Muon by its name, which would orthogonalise before the gradient norm is known and a step can be refused.)
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, params: Iterable, should_skip: Callable[[], bool], map_matrices: MapMatrices, **settings: Any):
        self._map_matrices = map_matrices
        groups = [
            {**group, "members": list(group["params"])} for group in params
        ]  # what wraps it puts flat ones in `params`
        super().__init__(groups, should_skip, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the weights, unless told not to."""
        groups = self.param_groups
        for group in [] if self._should_skip() else groups:
            for weight in group["params"] if "muon_momentum" in group else ():
                self._move(weight, group)
        self.param_groups = [group for group in groups if "muon_momentum" not in group]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _move(self, weight, group):
        state, beta, rate = self.state[weight], group["muon_momentum"], group["lr"]
        if not state:
            state.update(step=torch.zeros((), dtype=torch.float32), exp_avg=torch.zeros_like(weight))
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(weight.grad, 1 - beta)
        update = weight.grad.lerp(momentum, beta)  # Nesterov's
        self._map_matrices(group["members"], weight, update, orthogonal)
        weight.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonal(matrix: torch.Tensor, num_iterations: int = 5) -> torch.Tensor:
    """The orthogonal matrix nearest to `matrix` [m, n], roughly, with entries of the size of AdamW's updates.

    Newton-Schulz with Muon's coefficients (https://kellerjordan.github.io/posts/muon): singular values end between 0.7 and 1.2.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if is_tall else matrix).to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    x = x / (x.norm() + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrix.dtype) * (MUON_SIZE * math.sqrt(max(matrix.shape)))


def parameter_groups(model: torch.nn.Module, config: OptimizerConfig) -> list[dict]:
    """The trained parts in groups that share settings: per part (and layer, where rates decay), matrices and vectors apart.

    Vectors do not decay; each group has its peak `lr`. Frozen parts, and what has an adapter, get `requires_grad=False`; frozen
    parts stay as at inference when the model trains. With `train_image_tokens` embedding and output layer of a language model that is
    frozen, or has an adapter, are a group of their own, in which only the image tokens' rows get a gradient; the others keep every
    bit, since without decay nothing else moves them.

    Raises:
        UserError: every part is frozen; `train_image_tokens` of a language model that is trained anyway.
    """
    groups = []
    hidden = _hidden_matrices(model) if config.matrices == "muon" else set()
    model.frozen_parts = [prefix.rstrip(".") for part, prefix in PARTS.items() if not getattr(config, part).train]
    for part, prefix in PARTS.items():
        settings = getattr(config, part)
        named = {name: p for name, p in model.named_parameters() if name.startswith(prefix)}
        for parameter in named.values():
            parameter.requires_grad_(False)
        if any(ADAPTER in name for name in named):  # it is trained in the part's place
            named = {name: p for name, p in named.items() if ADAPTER in name}
        if not settings.train:
            continue
        for parameter in named.values():
            parameter.requires_grad_(True)
        groups += _groups_of_part(named, settings, config, hidden)
    if config.train_image_tokens:
        has_adapter = any(name.startswith(PARTS["text"]) and ADAPTER in name for name, _ in model.named_parameters())
        if config.text.train and not has_adapter:
            raise UserError(
                "optimizer.train_image_tokens=true: the language model is trained whole, these rows too (optimizer.text.train=true); set "
                "one of them to false"
            )
        groups.append({"params": _image_token_rows(model), "lr": config.text.learning_rate, "weight_decay": 0.0})
    if not groups:
        raise UserError(
            "optimizer: vision, projector and text are all frozen; set optimizer.projector.train=true or another part's"
        )
    return groups


def _groups_of_part(named, settings, config, hidden):
    """The groups of one part's trained parameters {name: parameter}, without those that would be empty."""
    groups = []
    decay = config.weight_decay if settings.weight_decay == "same" else settings.weight_decay
    betas = config.betas if settings.betas == "same" else settings.betas
    scales = layer_scales(list(named), settings.layer_decay)
    for scale in sorted(set(scales.values()), reverse=True):
        members = [p for name, p in named.items() if scales[name] == scale]
        common = {"lr": settings.learning_rate * scale, "betas": betas}
        by_muon = [p for p in members if p in hidden]
        for parameter in by_muon:
            parameter.moments = ("exp_avg",)  # what `parallel.slices` finds of it in an optimizer's state
        matrices = [p for p in members if _is_matrix(p) and p not in hidden]
        vectors = [p for p in members if not _is_matrix(p)]
        groups += [
            {"params": by_muon, "weight_decay": decay, "muon_momentum": config.muon_momentum, **common},
            {"params": matrices, "weight_decay": decay, **common},
            {"params": vectors, "weight_decay": 0.0, **common},
        ]
    return [group for group in groups if group["params"]]


def layer_scales(names: Sequence[str], layer_decay: float) -> dict[str, float]:
    """{name of a part's parameter: share of the part's rate}: what comes after the last layer has 1, the last layer
    `layer_decay`, the one before it its square, and what comes before the first layer the least.

    A layer is what shares the first number in a name (`layers.3.`); of a tower in stages that is a stage.
    """
    numbers = [int(found[1]) if (found := re.search(r"\.(\d+)\.", name)) else None for name in names]
    if layer_decay == 1 or all(number is None for number in numbers):
        return dict.fromkeys(names, 1.0)
    num_layers = 1 + max(number for number in numbers if number is not None)
    depth, scales = 0, {}
    for name, number in zip(names, numbers):
        if number is not None:
            depth = number + 1
        elif depth:  # after a layer in the order of the model, so after all of them
            depth = num_layers + 1
        scales[name] = layer_decay ** (num_layers + 1 - depth)
    return scales


def make_optimizer(
    groups: list[dict], config: OptimizerConfig
) -> Callable[[Callable[[], bool], MapMatrices], VetoableAdamW]:
    """What makes the optimizer of these groups once there is somebody to ask: (should_skip, map_matrices) -> optimizer."""
    settings: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "fused": True}
    if config.matrices == "muon":
        return functools.partial(VetoableOrthogonal, groups, **settings)
    return lambda should_skip, map_matrices: VetoableAdamW(groups, should_skip, **settings)


def _hidden_matrices(model):
    """The weights of linear layers, but for the output layer, which embeds words as the embedding does."""
    output = model.get_output_embeddings()
    return {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not output}


def _image_token_rows(model):
    """Embedding and output layer, tied or not, with gradients in the rows of the image tokens alone.

    A hook on the gradient sees it before whatever shards and reduces it, and whichever way it was computed.
    """
    config = model.config
    rows = torch.tensor([config.image_start_token_id, config.image_token_id, config.image_end_token_id])
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    parameters = dict.fromkeys(p for layer in layers if layer is not None for p in layer.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.register_hook(functools.partial(_only_rows, rows))
    return list(parameters)


def _only_rows(rows, gradient):
    rows = rows.to(gradient.device)
    kept = torch.zeros_like(gradient)
    kept[rows] = gradient[rows]
    return kept


def _is_matrix(parameter):
    return (
        len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
    )  # a ZeRO-3 shard is flat; its real rank is `ds_shape`
