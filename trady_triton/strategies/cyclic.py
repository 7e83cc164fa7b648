"""Cyclic draws: every channel of the pool once before any is drawn twice."""

from __future__ import annotations

from bisect import bisect_right

import torch

from trady_triton.sampling import Pool, Scores, Selection, epoch_generator


def draw_next(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """The next channels of a random order, from where the last epoch ended; a new order where one is used up.

    Independent draws of a share alpha of the pool leave (1 - alpha)^e of it untouched after e epochs; this reaches all
    of it in about 1 / alpha. BAdam (arXiv 2404.02827) runs over its blocks alike. An epoch that ends one order begins
    the next, with what it has not drawn yet. Every order up to that of the epoch is made
    again: a draw takes time in proportion to the cycles before it.
    """
    costs = torch.tensor([pool.costs[name] for name, _ in pool.units], dtype=torch.int64)
    queue, totals, start, cycle = torch.empty(0, dtype=torch.int64), [0], 0, 0
    chunk = queue
    for _ in range(epoch + 1):
        end = _end(totals, totals[start] + pool.budget)
        chunk, start, room = queue[start:end], end, pool.budget - (totals[end] - totals[start])
        if end == len(queue):
            queue = _ordered(pool, cycle, chunk)
            totals = [0, *costs[queue].cumsum(0).tolist()]
            start = _end(totals, room)
            chunk = torch.cat([chunk, queue[:start]])
            cycle += 1
    return pool.select(pool.units[i] for i in chunk.tolist())


def _end(totals: list[int], limit: int) -> int:
    """How many units from the front of a queue cost at most the limit; totals are the sums of their costs from 0."""
    return bisect_right(totals, limit) - 1


def _ordered(pool: Pool, cycle: int, last: torch.Tensor) -> torch.Tensor:
    """The random order of a cycle, with the units that the last epoch has already drawn at its end."""
    order = torch.randperm(len(pool.units), generator=epoch_generator(pool.seed, cycle, "cycle"))
    is_drawn = torch.zeros(len(order), dtype=torch.bool)
    is_drawn[last] = True
    is_drawn = is_drawn[order]
    return torch.cat([order[~is_drawn], order[is_drawn]])
