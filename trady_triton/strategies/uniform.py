"""Uniform draws: TraDy (D-TopK Random), and the paper's S-TopK, D-Full and S-Full Random, which share the rule."""

from __future__ import annotations

import math

import torch

from trady_triton.sampling import Pool, Scores, Selection, epoch_generator


def draw_uniform(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """Channels of the pool in random order, without replacement, until the budget is full (Algorithm 1).

    Uniform over channels, not over layers. The paper's four random strategies differ in the pool (the best K layers,
    or all) and in whether epoch 0 serves for all epochs; arXiv 2510.19675, sections 4.2 and 5. That a draw ends at
    the first channel that does not fit is inferred from the paper's Fig. 5, not stated there.
    """
    return pool.take(pool.permuted(epoch_generator(pool.seed, epoch)))


def uniform_inclusion(pool: Pool, scores: Scores | None = None) -> dict[str, list[float]]:
    """Probability that an epoch draws each channel, under the filling "stop": layer -> [C].

    Give each unit an arrival time, uniform in (0, 1): unit c is drawn if the cost of what came before it, a sum of
    independent terms given c's time t, leaves room for it. That sum is taken as normal; the error is below a percent
    from a few hundred channels on.
    """
    if pool.fill != "stop":
        raise ValueError(f"fill {pool.fill!r}: the inclusion probabilities of a uniform draw are known for 'stop' only")
    fitting = {name: cost for name, cost in pool.costs.items() if cost <= pool.budget}
    counts = {name: pool.shapes[name].in_channels for name in fitting}
    total = sum(cost * counts[name] for name, cost in fitting.items())
    squares = sum(cost**2 * counts[name] for name, cost in fitting.items())
    result = {}
    for name, shape in pool.shapes.items():
        cost = pool.costs[name]
        chance = _arrives_in_time(pool.budget - cost, total - cost, squares - cost**2) if name in fitting else 0.0
        result[name] = [chance] * shape.in_channels
    return result


def _arrives_in_time(room: int, total: int, squares: int, steps: int = 2000) -> float:
    """Mean over t of P(sum of the others' costs that arrived by t <= room)."""
    if total <= room:
        return 1.0
    t = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    deviation = (t * (1 - t) * squares).sqrt()
    return float((0.5 * (1 + torch.erf((room - t * total) / deviation / math.sqrt(2)))).mean())
