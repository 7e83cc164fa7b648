"""Plan: which layers may be trained, under which budget, and the draw of every epoch. Data only, no tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch

from trady_triton.arguments import expect
from trady_triton.budget import check_fits, check_ratios, read_budget, settled_budget
from trady_triton.cost import OPTIMIZER_STATES, STORE_BITS, CostModel, LayerShape
from trady_triton.policy import Policy
from trady_triton.pooling import choose_pool
from trady_triton.ranking import Ranking
from trady_triton.sampling import FILLS, Pool, Scores, Selection, epoch_generator
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


def make_plan(
    ranking: Ranking,
    *,
    budget: int | str | None,
    coverage: float | None = None,
    k: int | None = None,
    layers: Sequence[str] | Mapping[str, float] | None = None,
    sampler: str = "trady",
    dgrad_budget: float | None = None,
    correction_cap: float | None = None,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    activation_dtype: torch.dtype | None = None,
    cost_model: str = "exact",
    optimizer: str = "sgd",
    store: str = "same",
    fill: str = "stop",
    seed: int = 0,
    train_bias: bool = False,
    train_norm: bool = False,
    policy: Policy = Policy(),  # noqa: B008  frozen
) -> Plan:
    """Choose the pool of layers and fix the budget.

    The layers of which a channel fits the budget are ordered by RGN under the plan's own cost. The pool is the
    shortest prefix that holds `coverage` of their RGN, or the first `k` of them, or exactly `layers`. Samplers that
    draw from every layer take all of them unless told; "medyate" orders by LaRa and chooses K by the budget.

    Args:
        ranking: what `rank_layers` measured.
        budget: an integer counts elements for one sample, the paper's unit; a string such as "256KiB" or "1.5MB"
            counts the bytes of compact gradients and stores at the given batch size and dtypes. None for samplers
            without one: "full", "head", "bias", "neq", and the schemes of "su", which bring their own.
        coverage: share of the summed RGN that the pool must hold; the default 0.976 gives the paper's 35 / 27 / 43
            layers.
        k: number of layers, instead of `coverage`.
        layers: names of the pool, best first, instead of `coverage`; for "su" the part of each layer's channels by
            name, such as `trady_triton.models.su_layers` gives.
        sampler: which strategy draws the channels, a name in `trady_triton.strategies.STRATEGIES`.
        dgrad_budget: largest expected dX FLOPs, as a share of full fine-tuning's; each epoch then draws how deep it
            trains, and its backward stops there. For samplers whose inclusion probabilities are known.
        correction_cap: scale a channel's update by mean(pi) / pi, at most by this, where pi is its probability to be
            drawn: what is drawn rarely moves further. None: off, but 4 for "weighted".
        batch_size: samples whose inputs are stored at once (byte budgets only).
        dtype: of the weights and their gradients (byte budgets only).
        activation_dtype: of the stored inputs, such as torch.bfloat16 under autocast; by default `dtype`.
        cost_model: "exact", or "paper", which charges a depthwise channel one weight.
        optimizer: "sgd", "momentum" or "adamw": what will train, whose state of a drawn channel counts.
        store: "same" keeps the drawn channels as the layer saw them; "int8" and "int4" round them stochastically, so
            that at equal bytes more channels fit: an unbiased, noisier gradient (byte budgets only; docs/store.md).
        fill: "stop" ends a draw at the first channel that does not fit, "skip" goes on to the next. For samplers that
            take channels in an order; others have a rule of their own.
        seed: of all draws.
        train_bias: also train the biases of the ranked layers, outside the budget.
        train_norm: also train the weights and biases of normalisation layers of every kind, outside the budget; of
            BatchNorm alone with `policy=Policy(batch_norm="affine")`.
        policy: what the frozen layers keep for the backward; the default is exact.

    Raises:
        ValueError: an option out of its range, an unknown layer name, options that exclude each other, or a budget that
            no channel of the pool fits.
    """
    expect("policy", policy, Policy)
    expect("dtype", dtype, torch.dtype)
    expect("activation_dtype", activation_dtype or dtype, torch.dtype)
    if fill not in FILLS:
        raise ValueError(f"fill {fill!r}: wanted one of {', '.join(FILLS)}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed {seed!r}: wanted an integer")
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(f"optimizer {optimizer!r}: wanted one of {', '.join(OPTIMIZER_STATES)}")
    _check_pool_options(coverage, k, layers)
    chosen, states = strategy(sampler), OPTIMIZER_STATES[optimizer]
    if fill != FILLS[0] and not chosen.fills:
        raise ValueError(f"fill {fill!r}: sampler {sampler!r} has a rule of its own")
    limit, in_bytes = read_budget(budget, sampler, chosen)
    cost = CostModel(depthwise=cost_model, states=states)
    if in_bytes:
        sizes = dtype.itemsize, (activation_dtype or dtype).itemsize
        state_size = max(dtype.itemsize, 4) if states else 1
        cost = CostModel(batch_size, *sizes, "bytes", cost_model, states, state_size)
    cost = replace(cost, store=store)
    shapes = {layer.name: layer.shape for layer in ranking.layers}
    if layers is not None:
        _check_names(list(layers), shapes)
    ratios = check_ratios(sampler, chosen, layers)
    if limit is not None:
        check_fits(limit, {name: cost.channel_cost(shapes[name]) for name in layers or shapes}, cost.unit)
    pool = tuple(layers) if layers is not None else choose_pool(ranking, cost, limit, chosen.layers, coverage, k)
    limit = settled_budget(limit, Pool({name: shapes[name] for name in pool}, cost, 0, ratios=ratios))
    made = Plan(
        shapes,
        pool,
        ranking.head,
        limit,
        cost,
        fill,
        seed,
        train_bias or chosen.trains_bias,
        train_norm or sampler == "full",
        policy,
        sampler=sampler,
        dgrad_budget=dgrad_budget,
        correction_cap=4.0 if sampler == "weighted" and correction_cap is None else correction_cap,
        ratios=tuple(ratios.values()),
    )
    _check_depth(made)
    if made.correction_cap is not None:
        made.inclusion()  # raises where it is not known for this fill
    return made


def _check_depth(plan: Plan) -> None:
    """Raises ValueError where the depth budget or the correction cannot be had."""
    cap, share = plan.correction_cap, plan.dgrad_budget
    if cap is not None and not cap > 0:
        raise ValueError(f"correction_cap {cap!r}: wanted a number above 0, or None")
    if (cap is not None or share is not None) and plan.strategy.inclusion is None:
        option = "correction_cap" if share is None else "dgrad_budget"
        raise ValueError(f"{option}: the inclusion probabilities of sampler {plan.sampler!r} are not known")
    if share is None:
        return
    if isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"dgrad_budget {share!r}: wanted a share of full fine-tuning's dX in (0, 1]")
    if plan.trains_all_depths:
        raise ValueError("dgrad_budget: biases or norms are trained in every layer, so dX runs to the first of them")
    full = plan.dgrad_flops_above(next(iter(plan.shapes)))
    least = min(plan.dgrad_flops_above(name) for name in plan.pool) / max(1, full)
    if share < least:
        raise ValueError(f"dgrad_budget {share!r}: the shallowest layer of the pool takes {least:.4f} of full dX")


def _check_pool_options(coverage: object, k: object, layers: object) -> None:
    given = {name: value for name, value in (("coverage", coverage), ("k", k), ("layers", layers)) if value is not None}
    if len(given) > 1:
        options = ", ".join(f"{name} {value!r}" for name, value in given.items())
        raise ValueError(f"{options}: wanted one of them, each fixes the pool")


def _check_names(layers: Sequence[str], shapes: Mapping[str, LayerShape]) -> None:
    unknown = [name for name in layers if name not in shapes]
    if unknown or not layers or len(set(layers)) != len(layers):
        raise ValueError(
            f"layers {list(layers)}: wanted distinct names out of the ranking's {len(shapes)} layers; unknown: "
            f"{unknown or 'none'}"
        )
