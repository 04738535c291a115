"""Lengths with the statistics of a published VLM training mixture, made up from a seed; or read from a file.

Four kinds of samples as in InternVL's published length tables: diagrams, charts, pages and synthetic documents. Each kind has
a share, a log-normal of text tokens and its shares of 1, 3, 4 and 5 tiles; a tenth of all samples is text alone, and every
answer adds a heavy tail. The parameters were fitted to the published tables (3.9 tiles per sample with images); no row of theirs is in here.
"""

import numpy as np

KINDS = (
    # share, mean and deviation of log text tokens, shares of (1, 3, 4, 5) tiles
    (0.18, 3.97, 0.19, (0.47, 0.30, 0.05, 0.18)),
    (0.26, 4.29, 0.59, (0.03, 0.06, 0.00, 0.91)),
    (0.14, 5.40, 0.72, (0.00, 0.19, 0.00, 0.81)),
    (0.42, 4.72, 0.38, (0.00, 0.58, 0.00, 0.42)),
)
TILES = np.array([1, 3, 4, 5])
LONGEST_ANSWER = 4000


def workload(num_samples, seed=0, text_only=0.10, longest_text=7000):
    """(text tokens, tiles) of random samples: both [S] int64."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(len(KINDS), num_samples, p=[share for share, *_ in KINDS])
    text, tiles = np.empty(num_samples, np.int64), np.empty(num_samples, np.int64)
    for number, (_, mean, deviation, shares) in enumerate(KINDS):
        mine = np.flatnonzero(kind == number)
        text[mine] = rng.lognormal(mean, deviation, len(mine)).clip(20, longest_text // 2)
        tiles[mine] = rng.choice(TILES, len(mine), p=shares)
    text += np.minimum(rng.lognormal(4.6, 1.1, num_samples).astype(np.int64), LONGEST_ANSWER)
    alone = rng.random(num_samples) < text_only
    text[alone] = rng.lognormal(6.2, 0.9, alone.sum()).clip(16, longest_text)
    tiles[alone] = 0
    return text, tiles
