"""How deep an epoch trains: a random lowest layer, such that the expected FLOPs of dX stay within a limit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def depth_probabilities(flops: Sequence[int], limit: float) -> Tensor:
    """Probability of each lowest layer i, whose dX costs `flops[i]`: the most even ones with a mean within `limit`.

    Uniform where that is cheap enough; else p_i proportional to exp(-lambda * flops_i), which has the largest entropy
    for a given mean, so every depth keeps a chance.

    Raises:
        ValueError: not even the shallowest stays within the limit.
    """
    cost = torch.tensor([float(value) for value in flops], dtype=torch.float64)
    if limit < float(cost.min()):
        raise ValueError(f"{limit:g} FLOPs of dX: the shallowest choice takes {float(cost.min()):g}")
    low, high = 0.0, 1e6 / (float(cost.max()) or 1.0)  # there all but the shallowest have none
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _mean(cost, middle) <= limit else (middle, high)
    return _tilted(cost, high)


def _tilted(cost: Tensor, rate: float) -> Tensor:
    return torch.softmax(-rate * cost, 0)


def _mean(cost: Tensor, rate: float) -> float:
    return float((_tilted(cost, rate) * cost).sum())
