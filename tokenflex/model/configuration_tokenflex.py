"""Configuration of a TokenFLEX model: a vision encoder, a token-adaptive projector, a causal language model.

Travels with every exported model, so it imports nothing but transformers.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


class TokenFlexConfig(PreTrainedConfig):
    """Composite configuration (paper section 3.1).

    Args:
        vision_config: any Hugging Face vision encoder's configuration (or its dict with `model_type`).
        text_config: any Hugging Face causal language model's configuration (or its dict with `model_type`).
        image_height, image_width: pixels of the one size that every image (or tile) is resized to.
        pooling_mode: `adaptive` (the paper) or `resize` (the authors' release: bilinear to the next multiple, then average).
        pooling_detail: `none`, or `max`: the average plus a learned share of what the window's largest value has over it.
        projector_multiplier: inner width of the SwiGLU in units of the vision width C; the release has 3.
        vision_position_embedding: `none`, or `sine2d` for encoders that do not know where a feature lies (convolutional).
        vision_feature_layer: which hidden state of the encoder to use; -1 is the last.
        image_start_token_id, image_token_id, image_end_token_id: `<img>`, `<IMG_CONTEXT>`, `</img>`.
        trained_num_visual_tokens: the counts seen in training; any other count works and is warned of once.
        default_num_visual_tokens: the count used where the caller names none; 0 takes the largest trained count.
        sides: how a count is shaped: `square`, like the patches, or `aspect`, like what a tile shows of its image.
        share: how images shared a total in training: `even`, or `size`, which gives them counts between the trained ones.
        router: where the model has one (`router.py`): `num_visual_tokens` it chooses among, `hidden_size`, `turn_end_ids`, and the
            `effort` where the caller names none. None: the model has none.
    """

    model_type = "tokenflex"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs"]

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        image_height: int = 378,
        image_width: int = 378,
        pooling_mode: str = "adaptive",
        projector_multiplier: int = 3,
        vision_position_embedding: str = "none",
        vision_feature_layer: int = -1,
        image_start_token_id: int = 0,
        image_token_id: int = 1,
        image_end_token_id: int = 2,
        trained_num_visual_tokens: list[int] | tuple[int, ...] = (64, 144, 256),
        default_num_visual_tokens: int = 0,
        router: dict[str, Any] | None = None,
        pooling_detail: str = "none",
        sides: str = "square",
        share: str = "even",
        **kwargs: Any,
    ):
        self.vision_config = _sub_config(vision_config, "siglip_vision_model")
        self.text_config = _sub_config(text_config, "qwen2")
        self.image_height = image_height
        self.image_width = image_width
        if pooling_mode not in ("adaptive", "resize"):
            raise ValueError(f"pooling_mode is {pooling_mode!r}; it must be 'adaptive' or 'resize'")
        self.pooling_mode = pooling_mode
        if pooling_detail not in ("none", "max"):
            raise ValueError(f"pooling_detail is {pooling_detail!r}; it must be 'none' or 'max'")
        self.pooling_detail = pooling_detail
        if sides not in ("square", "aspect"):
            raise ValueError(f"sides is {sides!r}; it must be 'square' or 'aspect'")
        self.sides = sides
        self.share = share
        self.projector_multiplier = projector_multiplier
        if vision_position_embedding not in ("none", "sine2d"):
            raise ValueError(
                f"vision_position_embedding is {vision_position_embedding!r}; it must be 'none' or 'sine2d'"
            )
        self.vision_position_embedding = vision_position_embedding
        self.vision_feature_layer = vision_feature_layer
        self.image_start_token_id = image_start_token_id
        self.image_token_id = image_token_id
        self.image_end_token_id = image_end_token_id
        self.trained_num_visual_tokens = sorted(trained_num_visual_tokens)
        self.default_num_visual_tokens = default_num_visual_tokens or max(self.trained_num_visual_tokens)
        self.router = router
        kwargs.setdefault("tie_word_embeddings", bool(getattr(self.text_config, "tie_word_embeddings", False)))
        super().__init__(**kwargs)


def _sub_config(value, default_model_type):
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(value or {})
    return CONFIG_MAPPING[value.pop("model_type", default_model_type)](**value)
