"""Images to pixels: turned upright, laid on white, resized to one size, normalised.

Travels with every exported model, so it imports nothing but PIL, numpy, torch and transformers.
"""

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor


class TokenFlexImageProcessor(BaseImageProcessor):
    """Resize to `height` x `width` (aspect ratio not kept, as in InternVL), then (x / 255 - mean) / std per channel."""

    model_input_names = ["pixel_values"]

    def __init__(self, height=378, width=378, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5), **kwargs):
        super().__init__(**kwargs)
        self.height = height
        self.width = width
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(self, images, return_tensors="pt", **kwargs):
        """Images (PIL, path, or array [H, W, 3] of bytes; one or a list) -> `pixel_values` [images, 3, height, width]."""
        images = images if isinstance(images, (list, tuple)) else [images]
        resized = torch.from_numpy(np.stack([self.resized(image) for image in images]))
        return BatchFeature({"pixel_values": self.normalised(resized)}, tensor_type=return_tensors)

    def resized(self, image):
        """One image -> bytes [height, width, 3]."""
        image = upright_rgb(image)
        if image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), Image.Resampling.BICUBIC)
        return np.asarray(image)

    def normalised(self, resized_BHW3):
        """Bytes [B, height, width, 3] -> float32 `pixel_values` [B, 3, height, width], on the device they are on."""
        mean, std = (
            torch.tensor(x, device=resized_BHW3.device).view(3, 1, 1) for x in (self.image_mean, self.image_std)
        )
        return (resized_BHW3.permute(0, 3, 1, 2).float() / 255 - mean) / std


def upright_rgb(image):
    """Any image (PIL, path, array) as upright 8-bit RGB: EXIF rotation applied, alpha laid on white, 16 bit scaled."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    elif not isinstance(image, Image.Image):
        with Image.open(image) as file:
            file.load()
            image = file
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "I;16", "I;16B", "F"):
        array = np.asarray(image, dtype=np.float32)
        scale = 255.0 / 65535.0 if array.max(initial=0.0) > 255 else 1.0
        image = Image.fromarray((array * scale).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
