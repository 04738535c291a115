"""The generators that a run may draw from: saved, restored, and set from a step where ranks come and go."""

import json
import random

import numpy as np
import torch


def random_states() -> dict[str, torch.Tensor]:
    """The state of every generator a run may draw from, as tensors."""
    kind, numbers, *rest = np.random.get_state()
    plain = {"python": _listed(random.getstate()), "numpy": [kind, numbers.tolist(), *rest]}
    states = {name: torch.frombuffer(bytearray(json.dumps(s).encode()), dtype=torch.uint8) for name, s in plain.items()}
    states["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Put back what `random_states` gave."""
    version, numbers, gauss = json.loads(bytes(states["python"].tolist()))
    random.setstate((version, tuple(numbers), gauss))
    kind, numbers, *rest = json.loads(bytes(states["numpy"].tolist()))
    np.random.set_state((kind, np.array(numbers, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_all(seed: int, step: int, rank: int) -> None:
    """Let draws from here on depend on (seed, step, rank) alone; where ranks come and go no generator can be handed on."""
    seed = (seed * 1_000_003 + step) * 65_537 + rank
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _listed(state):
    version, numbers, gauss = state
    return [version, list(numbers), gauss]
