"""Which parameters are trained, in which groups, and an optimizer that can be kept from running."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..config import OptimizerConfig
from ..errors import UserError

PARTS = {"vision": "vision_tower.", "projector": "projector.", "text": "language_model."}
"""Part of the configuration -> prefix of its parameters' names."""


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


def parameter_groups(model: torch.nn.Module, config: OptimizerConfig) -> list[dict]:
    """The trained parts, one group per part for matrices and one for vectors (which do not decay), each with its peak `lr`.

    Frozen parts get `requires_grad=False` and stay as at inference when the model trains. With `train_image_tokens` embedding
    and output layer of a frozen language model are a group of their own, in which only the image tokens' rows get a gradient;
    the others keep every bit, since without decay nothing else moves them.

    Raises:
        UserError: every part is frozen; `train_image_tokens` of a language model that is trained anyway.
    """
    groups = []
    model.frozen_parts = [prefix.rstrip(".") for part, prefix in PARTS.items() if not getattr(config, part).train]
    for part, prefix in PARTS.items():
        settings = getattr(config, part)
        parameters = [p for name, p in model.named_parameters() if name.startswith(prefix)]
        for parameter in parameters:
            parameter.requires_grad_(settings.train)
        if not settings.train:
            continue
        for decay, members in (
            (config.weight_decay, [p for p in parameters if _is_matrix(p)]),
            (0.0, [p for p in parameters if not _is_matrix(p)]),
        ):
            if members:
                groups.append({"params": members, "lr": settings.learning_rate, "weight_decay": decay})
    if config.train_image_tokens:
        if config.text.train:
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


def make_adamw(groups: list[dict], config: OptimizerConfig) -> Callable[[Callable[[], bool]], VetoableAdamW]:
    """What makes the optimizer of these groups once there is somebody to ask: (should_skip) -> optimizer."""
    return functools.partial(VetoableAdamW, groups, betas=config.betas, eps=config.eps, fused=True)


def _is_matrix(parameter):
    return (
        len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
    )  # a ZeRO-3 shard is flat; its real rank is `ds_shape`
