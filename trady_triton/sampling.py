"""What every draw of channels shares: the pool it draws from, the filling of a budget, and the selection it gives.

Shapes: C input channels and O output channels of a layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from trady_triton.cost import CostModel, LayerShape

FILLS = ("stop", "skip")

Unit = tuple[str, int]  # a layer and one of its channels
Scores = Mapping[str, Tensor]  # layer -> a number for each input channel [C] (or output channel [O]), float


class Selection(dict[str, tuple[int, ...]]):
    """The channels of an epoch: layer name -> ids, ascending. A layer without any is absent, and reads as ().

    `scale` holds a factor for the update of each of these channels, layer by layer; a layer that it lacks has 1.
    `outputs` holds the output channels that are updated; a layer that it lacks updates all. `charged` is what a
    strategy that counts by a rule of its own charges for the draw; None means the plan's costs of the channels.
    """

    def __init__(
        self,
        channels: Iterable[tuple[str, tuple[int, ...]]] = (),
        *,
        scale: Mapping[str, Sequence[float]] | None = None,
        outputs: Mapping[str, tuple[int, ...]] | None = None,
        charged: int | None = None,
    ) -> None:
        super().__init__(channels)
        self.scale: Mapping[str, Sequence[float]] = scale or {}
        self.outputs: Mapping[str, tuple[int, ...]] = outputs or {}
        self.charged = charged

    def __missing__(self, layer: str) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class Pool:
    """What a draw chooses from: layers best first, what a channel of each costs, the budget, the filling, the seed.

    `ratios` says, for schemes that fix it, which part of a layer's channels is trained.
    """

    shapes: Mapping[str, LayerShape]
    cost: CostModel
    budget: int
    fill: str = "stop"
    seed: int = 0
    ratios: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def costs(self) -> dict[str, int]:
        """Cost of one input channel of each layer."""
        return {name: self.cost.channel_cost(shape) for name, shape in self.shapes.items()}

    @cached_property
    def units(self) -> list[Unit]:
        """Every channel that fits the budget on its own: another could never be trained, only end a draw."""
        return [
            (name, channel)
            for name, shape in self.shapes.items()
            if self.costs[name] <= self.budget
            for channel in range(shape.in_channels)
        ]

    def permuted(self, generator: torch.Generator) -> list[Unit]:
        """The units in random order."""
        return [self.units[i] for i in torch.randperm(len(self.units), generator=generator).tolist()]

    def take(self, order: Sequence[Unit]) -> Selection:
        """Units in this order until the budget is full."""
        taken = fill([self.costs[name] for name, _ in order], self.budget, self.fill)
        return self.select(order[position] for position in taken)

    def select(self, units: Iterable[Unit]) -> Selection:
        """Exactly these units."""
        drawn: dict[str, list[int]] = {name: [] for name in self.shapes}
        for name, channel in units:
            drawn[name].append(channel)
        return Selection((name, tuple(sorted(ids))) for name, ids in drawn.items() if ids)

    def by_score(self, scores: Scores, *, per_cost: bool) -> list[Unit]:
        """The units, highest score first, or highest score per unit of cost; ties in the order of the pool."""
        worth = {name: (scores[name].double() / (self.costs[name] if per_cost else 1)).tolist() for name in self.shapes}
        return sorted(self.units, key=lambda unit: -worth[unit[0]][unit[1]])


def epoch_generator(seed: int, epoch: int, purpose: str = "") -> torch.Generator:
    """A CPU generator that depends on its arguments alone, so any process or restart draws the same."""
    digest = hashlib.sha256(f"trady {seed} {epoch} {purpose}".strip().encode()).digest()
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
