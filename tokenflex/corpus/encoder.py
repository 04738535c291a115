"""The quick start's vision encoder: a small ResNet, pretrained on scenes of the corpus to name the digit at every patch.

Why this file exists: a vision-language model is put together from a vision encoder that already sees and a language model
that already speaks; the quick start has no model hub to take one from. Learning to see from the answers of a language
model that cannot speak yet costs many times more than from labelled patches: minutes against seconds.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import BitConfig, BitModel

from ..files import over_processes, staged_folder
from .glyphs import NUM_CLASSES, Sources, load_sources
from .scenes import IMAGE_SIDE, INKS, Box, draw_grid, render

ENCODER_VERSION = 2
# A ResNet-v2 with group normalisation; of the encoders tried it learns digits fastest on a CPU.
ARCHITECTURE = {
    "layer_type": "preactivation", "num_groups": 8, "embedding_size": 64, "hidden_sizes": [128], "depths": [3],
}  # fmt: skip
INPUT_SIDE = 64
# The stem halves the image twice, and one stage halves nothing: a patch per 4 pixels.
GRID_SIDE = INPUT_SIDE // 4
NUM_SCENES = 6144
CELLS = (1, 2, 3, 4, 5, 6, 7)
NUM_STEPS = 500
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 4e-3
# Three patches in four show no digit.
BACKGROUND_WEIGHT = 0.3
BACKGROUND = NUM_CLASSES


def build_encoder(
    directory: Path, *, seed: int, num_scenes: int = NUM_SCENES, num_steps: int = NUM_STEPS, num_workers: int = 2
) -> Path:
    """Returns `directory`, holding the pretrained encoder in the format of transformers; built only if it is not there.

    Draws from the training split's glyphs and photographs only. Written beside `directory` and renamed when complete.
    """
    directory = Path(directory)
    if directory.exists():
        return directory
    pixels, digits, inks = _labelled_patches(seed, num_scenes, num_workers)
    tower = pretrain(pixels, digits, inks, seed, num_steps)
    with staged_folder(directory, replaces=False) as staging:
        tower.save_pretrained(staging)
    return directory


def _labelled_patches(seed: int, num_scenes: int, num_workers: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [N, 64, 64, 3] of uint8, the digit at each patch [N, 16, 16], the colour of the ink [N]."""
    sources = load_sources("train")
    shares = [range(start, num_scenes, num_workers) for start in range(num_workers)]
    render_share = partial(_render_share, seed=seed, sources=sources)
    parts = [part for _, part in over_processes(render_share, shares, num_workers)]
    order = np.argsort(np.concatenate([np.array(share) for share in shares]))
    return tuple(torch.from_numpy(np.concatenate(arrays)[order]) for arrays in zip(*parts))


def _render_share(indices: range, *, seed: int, sources: Sources) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pixels = np.zeros((len(indices), INPUT_SIDE, INPUT_SIDE, 3), np.uint8)
    digits = np.zeros((len(indices), GRID_SIDE, GRID_SIDE), np.int64)
    inks = np.zeros(len(indices), np.int64)
    for slot, index in enumerate(indices):
        rng = np.random.Generator(np.random.Philox(key=[seed, (1 << 52) | index]))
        scene = draw_grid(rng, sources, num_cells=int(rng.choice(CELLS)))
        image, boxes = render(scene, rng, sources)
        pixels[slot] = np.asarray(image.resize((INPUT_SIDE, INPUT_SIDE), Image.Resampling.BICUBIC))
        digits[slot] = patch_labels(boxes, GRID_SIDE, GRID_SIDE)
        inks[slot] = list(INKS).index(scene.ink)
    return pixels, digits, inks


def patch_labels(boxes: list[Box], rows: int, columns: int) -> np.ndarray:
    """Returns [rows, columns] of int64: the digit whose box holds the patch's centre, else `BACKGROUND`."""
    labels = np.full((rows, columns), BACKGROUND, np.int64)
    y, x = ((np.arange(count) + 0.5) * IMAGE_SIDE / count for count in (rows, columns))
    for box in boxes:
        inside_y = (y >= box.top) & (y < box.top + box.side)
        inside_x = (x >= box.left) & (x < box.left + box.side)
        labels[np.ix_(inside_y, inside_x)] = box.digit
    return labels


def pretrain(pixels: torch.Tensor, digits: torch.Tensor, inks: torch.Tensor, seed: int, num_steps: int) -> BitModel:
    """An encoder that has learned to name the digit at every patch, and the ink.

    pixels: [N, 64, 64, 3] of uint8. digits: [N, 16, 16] of int64, what `patch_labels` says. inks: [N], places in `scenes.INKS`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = BitModel(BitConfig(**ARCHITECTURE))
        width = tower.config.hidden_sizes[-1]
        digit_head, ink_head = nn.Linear(width, NUM_CLASSES + 1), nn.Linear(width, len(INKS))
        order = torch.cat([torch.randperm(len(pixels)) for _ in range(-(-num_steps * BATCH_SIZE // len(pixels)))])
    parameters = [*tower.parameters(), *digit_head.parameters(), *ink_head.parameters()]
    # Fused: its square root is the processor's; MKL's differs between processors.
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=num_steps, pct_start=0.1)
    class_weights = torch.ones(NUM_CLASSES + 1)
    class_weights[BACKGROUND] = BACKGROUND_WEIGHT
    for step in range(num_steps):
        batch = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        pixel_values = pixels[batch].permute(0, 3, 1, 2) / 127.5 - 1
        features = tower(pixel_values).last_hidden_state.permute(0, 2, 3, 1)
        of_digits = digits[batch] != BACKGROUND
        loss = F.cross_entropy(digit_head(features).flatten(0, 2), digits[batch].flatten(), weight=class_weights)
        ink = inks[batch, None, None].expand_as(of_digits)[of_digits]
        loss = loss + 0.3 * F.cross_entropy(ink_head(features[of_digits]), ink)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return tower.eval()
