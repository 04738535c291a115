"""One reading of every Hugging Face vision encoder: images in, a row-major grid of patch features out.

Travels with every exported model, so it imports nothing but torch and transformers. What differs between encoders is where the grid sits in
their output (class and register tokens come first, convolutional encoders answer with a feature map) and how they want
images of another size than they were built for.
"""

import functools
import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


def patch_stride(vision_config: PreTrainedConfig) -> int:
    """Pixels per side of a feature's patch: the patch size of a ViT, the total stride of an encoder that shrinks its map.

    Raises:
        ValueError: the configuration does not tell.
    """
    patch = getattr(vision_config, "patch_size", 4 if is_hierarchical(vision_config) else None)  # 4: a ResNet's stem
    patch = patch[0] if isinstance(patch, (tuple, list)) else patch
    if not isinstance(patch, int):
        raise ValueError(
            f"a vision encoder of type {vision_config.model_type} does not tell its patch_size; choose another"
        )
    if merges_patches(vision_config):
        return patch * vision_config.spatial_merge_size
    return patch * 2 ** (_num_stages(vision_config) - 1)  # every stage after the first halves the grid


def is_hierarchical(vision_config: PreTrainedConfig) -> bool:
    """Whether features come from a map in stages, even a single one, each feature seeing far beyond its patch."""
    return _has_sizes(vision_config) or _num_stages(vision_config) > 1


def _has_sizes(vision_config):
    """Whether a width is told per stage, as ConvNeXt, ResNet and their kin do."""
    return isinstance(getattr(vision_config, "hidden_sizes", None), (list, tuple))


def _num_stages(vision_config):
    """Stages of ConvNeXt, ResNet and their kin (`hidden_sizes`), of Swin and its kin (`embed_dim`, `depths`); 1 for ViTs."""
    if _has_sizes(vision_config):
        return len(vision_config.hidden_sizes)
    has_stages = hasattr(vision_config, "embed_dim") and isinstance(
        getattr(vision_config, "depths", None), (list, tuple)
    )
    return len(vision_config.depths) if has_stages else 1


def merges_patches(vision_config: PreTrainedConfig) -> bool:
    """Whether this is a tower of the Qwen-VL family: patches come as rows, and square blocks of them leave as one feature."""
    return hasattr(vision_config, "spatial_merge_size") and hasattr(vision_config, "temporal_patch_size")


def patch_width(vision_config: PreTrainedConfig) -> int:
    """Width C of the patch features.

    Raises:
        ValueError: the configuration does not tell.
    """
    if _has_sizes(vision_config):
        return vision_config.hidden_sizes[-1]
    names = ["out_hidden_size", "hidden_size"] if merges_patches(vision_config) else ["hidden_size"]
    width = next((getattr(vision_config, name, None) for name in names if getattr(vision_config, name, None)), None)
    if width is None:
        raise ValueError(
            f"a vision encoder of type {vision_config.model_type} does not tell its hidden_size; choose another"
        )
    return width


def patch_grid(vision_config: PreTrainedConfig, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of patches in an image of `height` x `width` pixels.

    Raises:
        ValueError: the image is not a whole number of patches.
    """
    stride = patch_stride(vision_config)
    if height % stride or width % stride or min(height, width) < stride:
        raise ValueError(
            f"an image of {height} x {width} pixels is not a whole number of patches: {vision_config.model_type} has one "
            f"patch per {stride} pixels; set image_height and image_width to multiples of {stride}"
        )
    return height // stride, width // stride


def patch_features(
    vision_tower: PreTrainedModel, pixel_values: torch.Tensor, layer: int = -1, position_embedding: str = "none"
) -> torch.Tensor:
    """Features of every patch: pixel_values [B, 3, H, W] -> [B * rows * columns, C], images one after another.

    With `position_embedding="sine2d"` each patch is told where it lies (see `sine2d`).
    """
    return patch_outputs(vision_tower, pixel_values, layer, position_embedding)[0]


def patch_outputs(
    vision_tower: PreTrainedModel,
    pixel_values: torch.Tensor,
    layer: int = -1,
    position_embedding: str = "none",
    **options: Any,
) -> tuple[torch.Tensor, ModelOutput]:
    """As `patch_features`, and the encoder's whole output beside it; `options` (`output_attentions`, ...) are its own."""
    features, outputs = _patch_features(vision_tower, pixel_values, layer, options)
    if position_embedding == "none":
        return features, outputs
    rows, columns = patch_grid(vision_tower.config, *pixel_values.shape[-2:])
    places = sine2d(rows, columns, features.shape[-1]).to(features).repeat(len(pixel_values), 1)
    return features + places, outputs


def sine2d(rows: int, columns: int, width: int) -> torch.Tensor:
    """Fixed sine and cosine of each patch's place in the image: [rows * columns, width]; half of the width per axis.

    Convolutional encoders do not know where in the image a feature lies, and a language model sees only the order of the
    visual tokens, which means another place at every count. Told before pooling, the place is averaged with the features,
    so a token says where its window lies whatever the count. Half a period to four periods over the image.
    """
    return torch.cat([axis.flatten(0, 1) for axis in _sine_axes(rows, columns, width)], dim=-1)


def _sine_axes(rows, columns, width):
    for length, size, across in ((rows, width // 2, False), (columns, width - width // 2, True)):
        place = (torch.arange(length) + 0.5) / length * 2 - 1  # -1 to 1 over the image
        phase = place[:, None] * torch.pi * 2 ** torch.linspace(-1, 2, (size + 1) // 2)
        axis = torch.cat([phase.sin(), phase.cos()], dim=-1)[:, :size]
        yield axis.expand(rows, columns, size) if across else axis[:, None].expand(rows, columns, size)


def _patch_features(vision_tower, pixel_values, layer, options):
    config = vision_tower.config
    rows, columns = patch_grid(config, *pixel_values.shape[-2:])
    if merges_patches(config):
        if layer != -1:
            raise ValueError(
                f"vision_feature_layer is {layer}; a tower of type {config.model_type} has its last layer only"
            )
        outputs = vision_tower(**_merged_inputs(vision_tower, pixel_values), return_dict=True, **options)
        return outputs.pooler_output, outputs
    options = {**options, "output_hidden_states": True} if layer != -1 else options
    outputs = vision_tower(**_inputs(vision_tower, pixel_values, rows, columns), return_dict=True, **options)
    hidden = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
    if hidden.dim() == 4:
        return hidden.flatten(2).transpose(1, 2).flatten(0, 1), outputs
    first = max(0, hidden.shape[1] - rows * columns)
    return hidden[:, first:].flatten(0, 1), outputs  # class and register tokens come first


def _inputs(vision_tower, pixel_values, rows, columns):
    """The encoder's own arguments; position embeddings are interpolated where the image has not the encoder's size."""
    config = vision_tower.config
    if config.model_type == "siglip2_vision_model":
        stride = config.patch_size
        patches = pixel_values.unflatten(2, (rows, stride)).unflatten(4, (columns, stride))  # B 3 rows s columns s
        batch = pixel_values.shape[0]
        return {
            "pixel_values": patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1),
            "pixel_attention_mask": torch.ones(batch, rows * columns, dtype=torch.long, device=pixel_values.device),
            "spatial_shapes": torch.tensor([[rows, columns]] * batch, device=pixel_values.device),
        }
    if "interpolate_pos_encoding" in _arguments(type(vision_tower)):
        size = config.image_size
        size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        return {"pixel_values": pixel_values, "interpolate_pos_encoding": tuple(pixel_values.shape[-2:]) != size}
    return {"pixel_values": pixel_values}


@functools.lru_cache
def _arguments(tower_class):
    return frozenset(inspect.signature(tower_class.forward).parameters)


def _merged_inputs(vision_tower, pixel_values):
    """Images as a Qwen-VL tower wants them: patches one after another, block by block, each repeated over the frames of one
    temporal patch; and the patches per frame, column and row of each image."""
    config = vision_tower.config
    stride, merge = config.patch_size, config.spatial_merge_size
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // stride, width // stride
    blocks = pixel_values.reshape(batch, channels, rows // merge, merge, stride, columns // merge, merge, stride)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(
        6
    )  # B, block row, block column, row, column, 3, frame, s, s
    frames = blocks.expand(*(-1,) * 6, config.temporal_patch_size, -1, -1)
    name = "pixel_values" if "pixel_values" in _arguments(type(vision_tower)) else "hidden_states"
    grid = torch.tensor([[1, rows, columns]] * batch, device=pixel_values.device)
    return {name: frames.reshape(batch * rows * columns, -1), "grid_thw": grid}
