"""The pool of a plan: which of the ranked layers may be trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from trady_triton.cost import CostModel
from trady_triton.ranking import Ranking

COVERAGE = 0.976  # of the summed RGN: gives the paper's 35 / 27 / 43 layers


def choose_pool(
    ranking: Ranking, cost: CostModel, budget: int | None, kind: str, coverage: float | None, k: int | None
) -> tuple[str, ...]:
    """Names of the layers that a plan may train, best first.

    Of the layers of which a channel fits the budget (of all, without one): the shortest prefix that holds `coverage`
    of the worth, or the first `k`. By default kind "rgn" takes a coverage of 0.976, "all" every layer, and "lara",
    which orders by LaRa, as few layers as cost five budgets.

    Raises:
        ValueError: `coverage` or `k` out of its range.
    """
    fitting = [layer for layer in ranking.layers if budget is None or cost.channel_cost(layer.shape) <= budget]
    worth = {layer.name: layer.lara(cost) if kind == "lara" else layer.rgn(cost) for layer in fitting}
    order = sorted(worth, key=lambda name: -worth[name])
    if k is not None:
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(order):
            raise ValueError(f"k {k!r}: wanted an integer from 1 to the {len(order)} layers of which a channel fits")
        return tuple(order[:k])
    if coverage is not None and not 0 < coverage <= 1:
        raise ValueError(f"coverage {coverage!r}: wanted a share in (0, 1]")
    if coverage is None and kind == "lara" and budget is not None:
        wholes = {layer.name: layer.shape.in_channels * cost.channel_cost(layer.shape) for layer in fitting}
        return tuple(order[: _adaptive_k([wholes[name] for name in order], budget)])
    if coverage is None and kind == "all":
        return tuple(order)
    wanted = (COVERAGE if coverage is None else coverage) * math.fsum(worth.values())
    for count in range(1, len(order)):
        if math.fsum(worth[name] for name in order[:count]) >= wanted:
            return tuple(order[:count])
    return tuple(order)


def _adaptive_k(wholes: Sequence[int], budget: int) -> int:
    """The smallest K whose layers cost at least five budgets (MeDyate: alpha_K = B / M_K <= 0.2), else all."""
    return next((k for k, total in enumerate(accumulate(wholes), 1) if budget <= 0.2 * total), len(wholes))
