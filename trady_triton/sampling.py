"""Draws of channels under a budget: pure functions of the costs, the budget, the seed and the epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate

import torch

FILLS = ("stop", "skip")


class Selection(dict[str, tuple[int, ...]]):
    """The channels of an epoch: layer name -> ids, ascending. A layer without any is absent, and reads as ()."""

    def __missing__(self, layer: str) -> tuple[int, ...]:
        return ()


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator that depends on (seed, epoch) alone, so any process or restart draws the same."""
    digest = hashlib.sha256(f"trady {seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def fill(costs: Sequence[int], budget: int, rule: str) -> list[int]:
    """Positions of `costs`, taken in order, whose sum stays within the budget (Algorithm 1).

    "stop" ends at the first that does not fit; "skip" leaves that one out and goes on, which fills the budget better
    but favours cheap channels.
    """
    if rule == "stop":
        return list(range(sum(total <= budget for total in accumulate(costs))))
    taken, used = [], 0
    for position, cost in enumerate(costs):
        if used + cost <= budget:
            taken.append(position)
            used += cost
    return taken


def draw_uniform(
    channels: Sequence[int], costs: Sequence[int], budget: int, *, rule: str, seed: int, epoch: int
) -> list[tuple[int, ...]]:
    """TraDy's draw: uniform over all channels of the pool, without replacement, until the budget is full.

    Layer i of the pool has `channels[i]` input channels of `costs[i]` each; the result holds its drawn channel ids,
    ascending. A channel that alone exceeds the budget takes no part: it could never be trained, only end the draw.
    """
    units = [
        (layer, channel)
        for layer, (count, cost) in enumerate(zip(channels, costs, strict=True))
        if cost <= budget
        for channel in range(count)
    ]
    order = torch.randperm(len(units), generator=epoch_generator(seed, epoch)).tolist()
    taken = fill([costs[units[unit][0]] for unit in order], budget, rule)
    drawn: list[list[int]] = [[] for _ in channels]
    for position in taken:
        layer, channel = units[order[position]]
        drawn[layer].append(channel)
    return [tuple(sorted(ids)) for ids in drawn]
