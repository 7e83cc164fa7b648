"""Plan: which layers may be trained, under which budget, and the draw of every epoch. Data only, no tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate

import torch

from trady_triton.cost import STORE_BITS, CostModel, LayerShape
from trady_triton.policy import Policy
from trady_triton.sampling import Pool, Scores, Selection, epoch_generator
from trady_triton.savings import Savings, mean_savings
from trady_triton.serial import read_json, write_json
from trady_triton.strategies import REQUIRED, Strategy, strategy
from trady_triton.strategies.depth import depth_probabilities


@dataclass(frozen=True)
class Plan:
    """A budget and the pool of layers whose channels are drawn from it. Make one with `make_plan`.

    `shapes` holds every ranked layer in forward order, `pool` the names of those that are trained, best first, `head`
    the modules that are always trained and do not count. `budget` is in units of `cost`. A plan made for a `memory`
    carries it, in bytes: the peak of a whole step, run `micro_batch` samples at a time.

    `sampler` names the strategy that draws. With a `dgrad_budget` each epoch first draws its lowest layer. With a
    `correction_cap` the update of a channel is scaled by mean(pi) / pi, at most by the cap, where pi is its inclusion
    probability and the mean is over the pool. `ratios` belong to a Sparse Update scheme: one for each layer.
    """

    shapes: Mapping[str, LayerShape]
    pool: tuple[str, ...]
    head: tuple[str, ...]
    budget: int
    cost: CostModel
    fill: str = "stop"
    seed: int = 0
    train_bias: bool = False
    train_norm: bool = False
    policy: Policy = Policy()  # noqa: RUF009  frozen
    memory: int | None = None
    micro_batch: int | None = None
    sampler: str = "trady"
    dgrad_budget: float | None = None
    correction_cap: float | None = None
    ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 0:
            raise ValueError(f"budget {self.budget!r}: wanted an integer of at least 0, in the plan's unit")
        if unknown := [name for name in self.pool if name not in self.shapes]:
            raise ValueError(f"pool: layer {unknown[0]!r} has no shape")

    def sample(self, epoch: int, scores: Scores | None = None) -> Selection:
        """The channels of an epoch: layer name -> input channel ids, ascending, for every layer that is drawn from.

        A pure function of the plan, the epoch and the scores: the same in every process and after every restart. What
        the draw is charged never exceeds the budget.

        Args:
            epoch: from 0.
            scores: layer -> a number for each channel [C], for samplers that draw by them; TraDyOptimizer keeps those
                that it can measure itself.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch {epoch!r}: wanted an integer of at least 0")
        drawn = self._draw(epoch, scores)
        if self.correction_cap is not None:
            drawn.scale = self._step_scales(drawn, scores)
        return drawn

    def inclusion(self, scores: Scores | None = None) -> dict[str, tuple[float, ...]]:
        """Probability that an epoch draws each channel of the pool, given the scores: layer -> [C].

        With a `dgrad_budget` the mean over the depths that may be drawn.

        Raises:
            ValueError: it is not known for this sampler.
        """
        known = self.strategy.inclusion
        if known is None:
            raise ValueError(f"sampler {self.sampler!r}: its inclusion probabilities are not known")
        self._check_scores(scores)
        result = {name: [0.0] * self.shapes[name].in_channels for name in self.pool}
        for depth, weight in self.depths.items() or [(None, 1.0)]:
            for name, chances in known(self._pool(depth), scores).items():
                result[name] = [total + weight * chance for total, chance in zip(result[name], chances, strict=True)]
        return {name: tuple(chances) for name, chances in result.items()}

    @cached_property
    def depths(self) -> dict[str, float]:
        """Probability of each layer to be the lowest that an epoch may draw from; none without a `dgrad_budget`."""
        if self.dgrad_budget is None:
            return {}
        flops = [self.dgrad_flops_above(name) for name in self.shapes]
        candidates = self._depth_candidates()
        limit = self.dgrad_budget * max(flops)
        chances = depth_probabilities([self.dgrad_flops_above(name) for name in candidates], limit)
        return dict(zip(candidates, chances.tolist(), strict=True))

    def draw_depth(self, epoch: int) -> str | None:
        """The lowest layer that an epoch may draw from; None is the whole pool."""
        if not self.depths:
            return None
        mark = float(torch.rand((), generator=epoch_generator(self.seed, epoch, "depth"), dtype=torch.float64))
        names = list(self.depths)
        passed = [total for total in accumulate(self.depths.values()) if total <= mark]
        return names[min(len(passed), len(names) - 1)]

    def dgrad_flops_above(self, layer: str) -> int:
        """FLOPs of dX, one sample, where `layer` is the lowest that is trained: of all layers called after it."""
        names = list(self.shapes)
        return sum(self.shapes[name].dense_flops for name in names[names.index(layer) + 1 :])

    def used(self, channels: Mapping[str, Sequence[int]]) -> int:
        """What a draw is charged, in the plan's unit."""
        charged = getattr(channels, "charged", None)
        if charged is not None:
            return int(charged)
        return sum(len(ids) * self.cost.channel_cost(self.shapes[name]) for name, ids in channels.items())

    def expected(self, epochs: int = 300, scores: Scores | None = None) -> Savings:
        """Mean savings over the draws of epochs 0 to `epochs` - 1 (the paper's sparsities are the same fractions).

        Known before training. Samplers that learn scores while they train draw as in their first epoch, unless given.

        Raises:
            ValueError: `epochs` is no positive integer, or the sampler needs scores and got none.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"epochs {epochs!r}: wanted an integer of at least 1")
        draws = [self._draw(epoch, scores) for epoch in range(1 if self.strategy.is_static else epochs)]
        used, dgrad = [self.used(draw) for draw in draws], [self._dgrad_flops(draw) for draw in draws]
        return mean_savings(self.shapes, draws, used, dgrad, epochs)

    @property
    def strategy(self) -> Strategy:
        """How the channels are chosen."""
        return strategy(self.sampler)

    def _draw(self, epoch: int, scores: Scores | None) -> Selection:
        self._check_scores(scores)
        epoch = 0 if self.strategy.is_static else epoch
        return self.strategy.draw(self._pool(self.draw_depth(epoch)), epoch, scores)

    def _pool(self, depth: str | None = None) -> Pool:
        """What a draw chooses from: the pool, or its part from layer `depth` on."""
        names = list(self.shapes)
        first = 0 if depth is None else names.index(depth)
        shapes = {name: self.shapes[name] for name in self.pool if names.index(name) >= first}
        ratios = dict(zip(self.pool, self.ratios, strict=True)) if self.ratios else {}
        return Pool(shapes, self.cost, self.budget, self.fill, self.seed, ratios)

    def _depth_candidates(self) -> list[str]:
        """Layers of the pool above which, themselves included, the budget can be spent; all if none is that rich."""
        order = [name for name in self.shapes if name in self.pool]
        worth = {name: sum(n * self.cost.channel_cost(self.shapes[above]) for above, n in self._channels_from(name))
                 for name in order}  # fmt: skip
        rich = [name for name in order if worth[name] >= self.budget]
        limit = self.dgrad_budget * self.dgrad_flops_above(next(iter(self.shapes))) if self.dgrad_budget else 0
        return rich if rich and self.dgrad_flops_above(rich[-1]) <= limit else order

    def _channels_from(self, layer: str) -> list[tuple[str, int]]:
        names = list(self.shapes)
        return [(name, self.shapes[name].in_channels) for name in names[names.index(layer) :] if name in self.pool]

    def _dgrad_flops(self, draw: Selection) -> int:
        lowest = next((name for name in self.shapes if draw[name]), None)
        if self.trains_all_depths:
            lowest = next(iter(self.shapes))
        return 0 if lowest is None else self.dgrad_flops_above(lowest)

    def _step_scales(self, drawn: Selection, scores: Scores | None) -> dict[str, tuple[float, ...]]:
        assert self.correction_cap is not None
        chances = self.inclusion(scores)
        mean = math.fsum(chance for layer in chances.values() for chance in layer) / sum(map(len, chances.values()))
        return {
            name: tuple(min(self.correction_cap, mean / chances[name][channel]) for channel in ids)
            for name, ids in drawn.items()
        }

    def _check_scores(self, scores: Scores | None) -> None:
        if scores is None:
            if (needed := REQUIRED.get(self.strategy.scores)) is not None:
                raise ValueError(f"sampler {self.sampler!r}: wanted scores: {needed}")
            return
        for name in self.pool:
            if name not in scores:
                raise ValueError(f"scores: layer {name!r} is missing")
            shape, found = self.shapes[name], tuple(scores[name].shape)
            size = shape.out_channels if self.strategy.scores == "velocity" else shape.in_channels
            if found != (size,):
                raise ValueError(f"scores of layer {name!r}: shape {found}, wanted ({size},)")

    @property
    def trains_all_depths(self) -> bool:
        """Whether biases or norms are trained wherever they stand, so that dX runs down to the first layer."""
        return self.train_bias or self.train_norm or self.policy.batch_norm == "affine"

    @property
    def store(self) -> str:
        """How the drawn channels are stored for the backward: "same" as the layer saw them, "int8" or "int4"."""
        return self.cost.store

    @property
    def store_bits(self) -> int:
        """8 or 4 where the store is quantised, else 0."""
        return STORE_BITS[self.cost.store]

    @property
    def total_elements(self) -> int:
        """All weights and inputs of the ranked layers for one sample, whatever the cost model."""
        return sum(shape.weights + shape.inputs for shape in self.shapes.values())

    @property
    def pool_cost(self) -> int:
        """What training every channel of the pool would cost, in the plan's unit."""
        shapes = [self.shapes[name] for name in self.pool]
        return sum(shape.in_channels * self.cost.channel_cost(shape) for shape in shapes)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ where plans differ."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        write_json(path, "plan", asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else, or is damaged.
        """
        content = read_json(path, "plan")
        try:
            shapes = {name: LayerShape.from_dict(shape) for name, shape in content.pop("shapes").items()}
            cost = CostModel(**content.pop("cost"))
            policy = Policy(**content.pop("policy"))
            pool, head = tuple(content.pop("pool")), tuple(content.pop("head"))
            ratios = tuple(content.pop("ratios", ()))
            return cls(shapes=shapes, pool=pool, head=head, cost=cost, policy=policy, ratios=ratios, **content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: the plan is damaged ({error!r})") from error
