"""PaCA: the same number of columns of every layer, chosen once (Woo et al. 2025)."""

from __future__ import annotations

import torch

from trady_triton.sampling import Pool, Scores, Selection, epoch_generator


def draw_columns(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """r random input channels of each layer, r the largest that the budget pays for in all of them at once.

    Published for the Linear layers of a transformer with r = 8 or 16 and no budget; the budget, convolutions and
    depthwise layers are ours. Its factor alpha / r on the trained columns, which only scales the learning rate, is 1.
    A layer with fewer than r channels is trained whole. If not even r = 1 fits, the last layers of the pool get none.
    """
    generator = epoch_generator(pool.seed, epoch)
    rank = _largest_rank(pool)
    units, used = [], 0
    for name, shape in pool.shapes.items():
        order = torch.randperm(shape.in_channels, generator=generator).tolist()
        chosen = order[: max(1, rank)]
        if used + len(chosen) * pool.costs[name] <= pool.budget:
            units += [(name, channel) for channel in chosen]
            used += len(chosen) * pool.costs[name]
    return pool.select(units)


def _largest_rank(pool: Pool) -> int:
    most = max(shape.in_channels for shape in pool.shapes.values())
    return max(rank for rank in range(most + 1) if _cost(pool, rank) <= pool.budget)


def _cost(pool: Pool, rank: int) -> int:
    return sum(min(rank, shape.in_channels) * pool.costs[name] for name, shape in pool.shapes.items())
