"""Budgets as users write them, and what of them a sampler takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from trady_triton.sampling import Pool
from trady_triton.strategies import Strategy
from trady_triton.strategies.sparse_update import scheme_cost

_BYTES = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3}


def parse_budget(budget: int | str) -> tuple[int, bool]:
    """(amount, whether it counts bytes): 27946 -> (27946, False), "256KiB" -> (262144, True)."""
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget, False
    pattern = r"\s*(\d+(?:\.\d+)?)\s*((?:[kmg]i?)?b)\s*"
    match = re.fullmatch(pattern, budget, re.IGNORECASE) if isinstance(budget, str) else None
    if match and float(match[1]) > 0:
        return int(float(match[1]) * _BYTES[match[2].upper()]), True
    raise ValueError(f"budget {budget!r}: wanted a positive integer (elements, one sample) or bytes such as '256KiB'")


def read_budget(budget: int | str | None, sampler: str, chosen: Strategy) -> tuple[int | None, bool]:
    """The budget, if the sampler takes one, and whether it counts bytes."""
    if budget is None and (not chosen.has_budget or chosen.layers == "scheme"):
        return None, False
    if budget is None:
        raise ValueError(f"budget None and memory None: wanted one of them for sampler {sampler!r}")
    if not chosen.has_budget:
        raise ValueError(f"budget {budget!r}: sampler {sampler!r} takes none")
    return parse_budget(budget)


def settled_budget(limit: int | None, pool: Pool) -> int:
    """The budget itself, checked against a scheme; without one, what the scheme, or else the whole pool, costs."""
    if not pool.ratios:
        whole = sum(pool.shapes[name].in_channels * cost for name, cost in pool.costs.items())
        return whole if limit is None else limit
    wanted = scheme_cost(pool)
    if limit is not None and wanted > limit:
        raise ValueError(f"budget of {limit} {pool.cost.unit}: the scheme of `layers` takes {wanted}")
    return wanted if limit is None else limit


def check_ratios(
    sampler: str, chosen: Strategy, layers: Sequence[str] | Mapping[str, float] | None
) -> dict[str, float]:
    """The parts of a scheme's layers; none for other samplers. Raises ValueError where a scheme lacks them."""
    if chosen.layers != "scheme":
        return {}
    if not isinstance(layers, Mapping) or not all(0 < ratio <= 1 for ratio in layers.values()):
        raise ValueError(
            f"layers {layers!r}: sampler {sampler!r} wants a part in (0, 1] of each layer by name, such as "
            "trady_triton.models.su_layers gives"
        )
    return dict(layers)


def check_fits(budget: int, costs: Mapping[str, int], unit: str) -> None:
    """Raises ValueError where not even the cheapest channel fits."""
    cheapest = min(costs, key=lambda name: costs[name])
    if budget < costs[cheapest]:
        raise ValueError(
            f"budget of {budget} {unit} fits no channel: the smallest workable budget is {costs[cheapest]} {unit}, one "
            f"channel of layer {cheapest!r}"
        )
