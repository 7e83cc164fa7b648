"""Sparse Update: a fixed part of each of a few layers, found offline (Lin et al. 2022, arXiv 2206.15472)."""

from __future__ import annotations

import torch

from trady_triton.sampling import Pool, Scores, Selection, epoch_generator


def draw_largest(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """int(C * ratio) channels of each layer, those of largest weight norm ("magnitude+" of tiny-training, its default).

    Scores are the L2 norms of the pretrained weights per input channel. The published biases of the last layers are
    not trained: the paper's nets have none.
    """
    return _keep(pool, scores, sign=-1)


def draw_smallest(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """The same with the smallest norms ("magnitude-")."""
    return _keep(pool, scores, sign=1)


def draw_random(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """The same with channels at random ("random")."""
    generator = epoch_generator(pool.seed, epoch)
    noise = {name: torch.rand(shape.in_channels, generator=generator) for name, shape in pool.shapes.items()}
    return _keep(pool, noise, sign=1)


def scheme_cost(pool: Pool) -> int:
    """What a scheme trains, in the pool's unit of cost."""
    return sum(_count(pool, name) * cost for name, cost in pool.costs.items())


def _keep(pool: Pool, scores: Scores | None, sign: int) -> Selection:
    assert scores is not None
    units = []
    for name in pool.shapes:
        values = scores[name].tolist()
        order = sorted(range(len(values)), key=lambda channel, values=values: sign * values[channel])  # type: ignore[misc]
        units += [(name, channel) for channel in order[: _count(pool, name)]]
    return pool.select(units)


def _count(pool: Pool, name: str) -> int:
    return int(pool.shapes[name].in_channels * pool.ratios[name])
