"""One reading of every Hugging Face vision encoder: images in, a row-major grid of patch features out.

Travels with every exported model, so it imports nothing but torch. What differs between encoders is where the grid sits in
their output (class and register tokens come first, convolutional encoders answer with a feature map) and how they want
images of another size than they were built for.
"""

import torch


def patch_stride(vision_config):
    """Pixels per patch side: the patch size of a ViT, the total stride of a convolutional encoder."""
    patch = getattr(vision_config, "patch_size", 4)  # a ResNet's stem: convolution and pooling, each by 2
    patch = patch[0] if isinstance(patch, (tuple, list)) else patch
    if hasattr(
        vision_config, "hidden_sizes"
    ):  # ConvNeXt, ResNet and their kin: every stage after the first halves the grid
        return patch * 2 ** (len(vision_config.hidden_sizes) - 1)
    return patch


def patch_width(vision_config):
    """Width C of the patch features."""
    return vision_config.hidden_sizes[-1] if hasattr(vision_config, "hidden_sizes") else vision_config.hidden_size


def patch_grid(vision_config, height, width):
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


def patch_features(vision_tower, pixel_values, layer=-1, position_embedding="none"):
    """Features of every patch: pixel_values [B, 3, H, W] -> [B * rows * columns, C], images one after another.

    With `position_embedding="sine2d"` each patch is told where it lies (see `sine2d`).
    """
    features = _patch_features(vision_tower, pixel_values, layer)
    if position_embedding == "none":
        return features
    rows, columns = patch_grid(vision_tower.config, *pixel_values.shape[-2:])
    return features + sine2d(rows, columns, features.shape[-1]).to(features).repeat(len(pixel_values), 1)


def sine2d(rows, columns, width):
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


def _patch_features(vision_tower, pixel_values, layer):
    config = vision_tower.config
    height, width = pixel_values.shape[-2:]
    rows, columns = patch_grid(config, height, width)
    outputs = vision_tower(
        **_inputs(config, pixel_values, rows, columns), output_hidden_states=layer != -1, return_dict=True
    )
    hidden = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
    if hidden.dim() == 4:
        return hidden.flatten(2).transpose(1, 2).flatten(0, 1)
    return hidden[:, hidden.shape[1] - rows * columns :].flatten(0, 1)  # class and register tokens come first


def _inputs(config, pixel_values, rows, columns):
    """The encoder's own arguments; position embeddings are interpolated where the image has not the encoder's size."""
    if config.model_type == "siglip2_vision_model":
        stride = config.patch_size
        patches = pixel_values.unflatten(2, (rows, stride)).unflatten(4, (columns, stride))  # B 3 rows s columns s
        batch = pixel_values.shape[0]
        return {
            "pixel_values": patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1),
            "pixel_attention_mask": torch.ones(batch, rows * columns, dtype=torch.long, device=pixel_values.device),
            "spatial_shapes": torch.tensor([[rows, columns]] * batch, device=pixel_values.device),
        }
    if config.model_type in ("siglip_vision_model", "clip_vision_model"):
        resized = pixel_values.shape[-2:] != (config.image_size, config.image_size)
        return {"pixel_values": pixel_values, "interpolate_pos_encoding": bool(resized)}
    return {"pixel_values": pixel_values}
