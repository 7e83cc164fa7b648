"""Draws with known, unequal probabilities that never exceed the budget, so that updates can be weighted by 1 / pi.

For a draw whose expected cost is the budget, the variance sum_c g_c^2 / pi_c of the update weighted by 1 / pi is least
for pi_c = min(1, lambda * g_c / sqrt(cost_c)) (Lagrange).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trady_triton.sampling import Pool, Scores, Selection, epoch_generator
from trady_triton.strategies.uniform import draw_uniform, uniform_inclusion

FLOOR = 0.1  # of the mean norm: no channel's chance vanishes
LARGEST = 0.25  # of the budget: a channel that costs more takes no part


def draw_weighted(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """A systematic sample: every channel is drawn with exactly its `weighted_inclusion`.

    The channels lie in a row, each as long as its probability, dear layers first, in random order within a layer; what
    lies at u, u + 1, u + 2, ... for one random u is drawn. Along a row of descending costs such a sample costs at
    most its expected cost and the cost of one channel of the first layer; that much of the budget is left as a margin.
    """
    if not _taking_part(pool):
        return draw_uniform(pool, epoch)
    generator = epoch_generator(pool.seed, epoch)
    chances = weighted_inclusion(pool, scores)
    row = []
    for name in sorted(_taking_part(pool), key=lambda name: -pool.costs[name]):
        row += [(name, c) for c in torch.randperm(len(chances[name]), generator=generator).tolist()]
    ends = torch.tensor([chances[name][channel] for name, channel in row], dtype=torch.float64).cumsum(0)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    marks = (ends - start).floor()  # how many marks u, u + 1, ... lie before each end, less one
    before = torch.cat([torch.tensor([-1.0], dtype=torch.float64), marks[:-1]])
    return pool.select(unit for unit, hit in zip(row, (marks > before).tolist(), strict=True) if hit)


def weighted_inclusion(pool: Pool, scores: Scores | None = None) -> dict[str, list[float]]:
    """Probability that an epoch draws each channel: layer -> [C].

    `scores` are gradient norms g_c; without any, or where their mean is 0 or not finite, they count as equal. Where no
    channel costs less than a quarter of the budget the draw is uniform.
    """
    parts = _taking_part(pool)
    if not parts:
        return uniform_inclusion(pool)
    counts = [pool.shapes[name].in_channels for name in parts]
    cost = torch.tensor([float(pool.costs[name]) for name in parts], dtype=torch.float64)
    cost = cost.repeat_interleave(torch.tensor(counts))
    norms = torch.ones_like(cost) if scores is None else torch.cat([scores[name].double().cpu() for name in parts])
    mean = float(norms.mean())
    norms = (norms / mean).clamp(min=FLOOR) if 0 < mean < math.inf else torch.ones_like(norms)
    limit = pool.budget - (float(cost.max()) if cost.sum() > pool.budget else 0)
    chances = _least_variance(norms / cost.sqrt(), cost, limit)
    flat = iter(chances.tolist())
    found = {name: [next(flat) for _ in range(count)] for name, count in zip(parts, counts, strict=True)}
    return {name: found.get(name, [0.0] * shape.in_channels) for name, shape in pool.shapes.items()}


def _taking_part(pool: Pool) -> list[str]:
    return [name for name, cost in pool.costs.items() if cost <= LARGEST * pool.budget]


def _least_variance(weight: Tensor, cost: Tensor, limit: float) -> Tensor:
    """min(1, lambda * weight) whose expected cost is just within the limit."""
    if float(cost.sum()) <= limit:
        return torch.ones_like(weight)
    order = weight.argsort(descending=True)
    largest, charge = weight[order], cost[order]
    capped = charge.cumsum(0) - charge  # what is spent where all before a unit have probability 1
    factor = (limit - capped) / (largest * charge).flip(0).cumsum(0).flip(0)
    first = int((factor * largest <= 1).int().argmax())
    return (factor[first] * weight).clamp(max=1)
