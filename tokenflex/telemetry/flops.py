"""What a step costs in FLOPs of the model, by part: for the utilisation (MFU) that is logged.

Model FLOPs are what the mathematics needs: matrix products and attention within each sample, forward and backward, without
recomputation, padding or what an implementation wastes. A multiply and an add are two.
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..model.vision import patch_features


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """FLOPs of forward and backward pass together, for each of what a batch holds.

    per_tile: vision encoder. per_visual_token: projector. per_token: the language model's matrices. per_pair: its attention, each
    pair of a token and one before it (or itself) in the same sample. per_learned: its output layer, each token that it is run at.
    """

    per_tile: float
    per_visual_token: float
    per_token: float
    per_pair: float
    per_learned: float

    def vision(self, num_tiles: int, num_visual_tokens: int) -> float:
        """Of encoder and projector."""
        return self.per_tile * num_tiles + self.per_visual_token * num_visual_tokens

    def language(self, num_tokens: int, num_pairs: int, num_learned: int) -> float:
        """Of the language model."""
        return self.per_token * num_tokens + self.per_pair * num_pairs + self.per_learned * num_learned


def num_pairs(lengths: torch.Tensor) -> int:
    """Pairs that causal attention within samples looks at: each token with itself and those before it. lengths: [S]."""
    return int((lengths.long() * (lengths.long() + 1) // 2).sum())


def model_flops(model: PreTrainedModel) -> ModelFlops:
    """The FLOPs of a `TokenFlexForConditionalGeneration`, whatever of its weights is trained, here or on other ranks.

    A part costs its forward pass, once more where gradients go through it and once more where they are taken of its weights. The
    encoder's forward is counted on a copy of it without weights. Of experts, those that one token goes to.
    """
    text, head = model.language_model, model.language_model.get_output_embeddings()
    trained = {name: _is_trained(part) for name, part in _parts(model).items()}
    passes = 2 + trained["text"]  # gradients go through the language model to whatever is trained
    to_vision = trained["vision"] or trained["projector"]
    head_weights = {id(p) for p in head.parameters()} | {id(p) for p in text.get_input_embeddings().parameters()}
    matrices = sum(
        _size(p) * _active(text.config, name) for name, p in text.named_parameters() if id(p) not in head_weights
    )
    config = text.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * width
    encoder_passes = 3 if trained["vision"] else 1
    return ModelFlops(
        per_tile=encoder_passes * _forward_of_tile(model),
        per_visual_token=2 * sum(map(_size, model.projector.parameters())) * (3 if to_vision else 1),
        per_token=2 * matrices * passes,
        per_pair=attention * 3,  # its backward pass is to queries, keys and values, whose gradients are all wanted
        per_learned=2 * _rows(head.weight) * passes,
    )


def _parts(model):
    return {"vision": model.vision_tower, "projector": model.projector, "text": model.language_model}


def _is_trained(part: torch.nn.Module) -> bool:
    return any(p.requires_grad for p in part.parameters())


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _rows(parameter: torch.nn.Parameter) -> int:
    return torch.Size(_shape(parameter)).numel()


def _size(parameter: torch.nn.Parameter) -> int:
    """Elements of a matrix; vectors cost nothing worth counting."""
    return _rows(parameter) if len(_shape(parameter)) > 1 else 0


def _active(config: object, name: str) -> float:
    """The share of a parameter that one token meets: of experts, those that it is sent to."""
    if ".experts." not in name:
        return 1.0
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    return min(1.0, getattr(config, "num_experts_per_tok", num_experts) / num_experts)


def _forward_of_tile(model: PreTrainedModel) -> float:
    """FLOPs of one tile through the encoder: torch's own count, over a copy on the device `meta` that computes nothing."""
    config = model.config
    with torch.device("meta"):
        tower = type(model.vision_tower)(model.vision_tower.config).eval()
        pixels = torch.empty(1, 3, config.image_height, config.image_width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        patch_features(tower, pixels, config.vision_feature_layer)
    return float(counter.get_total_flops())
