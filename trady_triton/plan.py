"""Plan: which layers may be trained, under which budget, and the draw of every epoch. Data only, no tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from trady_triton.cost import OPTIMIZER_STATES, CostModel, LayerShape
from trady_triton.policy import Policy
from trady_triton.ranking import Ranking
from trady_triton.sampling import FILLS, Selection, draw_uniform
from trady_triton.serial import read_json, write_json

_BYTES = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3}


@dataclass(frozen=True)
class Savings:
    """Means over the draws of `epochs` epochs, as fractions of training every ranked layer whole.

    `channels` and `used` (in the plan's unit) are per epoch.
    """

    epochs: int
    channels: float
    used: float
    weight_saving: float
    activation_saving: float
    wgrad_flops_saving: float


@dataclass(frozen=True)
class Plan:
    """A budget and the pool of layers whose channels are drawn from it. Make one with `make_plan`.

    `shapes` holds every ranked layer in forward order, `pool` the names of those that are trained, best first, `head`
    the modules that are always trained and do not count. `budget` is in units of `cost`. A plan made for a `memory`
    carries it, in bytes: the peak of a whole step, run `micro_batch` samples at a time.
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

    def sample(self, epoch: int) -> Selection:
        """The channels of an epoch: layer name -> input channel ids, ascending, for every layer that is drawn from.

        A pure function of the plan and the epoch: the same in every process and after every restart. The sum of the
        channels' costs never exceeds the budget.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch {epoch!r}: wanted an integer of at least 0")
        shapes = [self.shapes[name] for name in self.pool]
        drawn = draw_uniform(
            [shape.in_channels for shape in shapes],
            [self.cost.channel_cost(shape) for shape in shapes],
            self.budget,
            rule=self.fill,
            seed=self.seed,
            epoch=epoch,
        )
        return Selection((name, ids) for name, ids in zip(self.pool, drawn, strict=True) if ids)

    def used(self, channels: Mapping[str, Sequence[int]]) -> int:
        """Cost of a draw, in the plan's unit."""
        return sum(len(ids) * self.cost.channel_cost(self.shapes[name]) for name, ids in channels.items())

    def expected(self, epochs: int = 300) -> Savings:
        """Mean savings over the draws of epochs 0 to `epochs` - 1 (the paper's sparsities are the same fractions)."""
        draws = [self.sample(epoch) for epoch in range(epochs)]
        mean = {name: sum(len(draw[name]) for draw in draws) / epochs for name in self.pool}
        drawn = [(self.shapes[name], count) for name, count in mean.items()]
        weights = sum(shape.weights for shape in self.shapes.values())
        inputs = sum(shape.inputs for shape in self.shapes.values())
        flops = sum(shape.dense_flops for shape in self.shapes.values())
        return Savings(
            epochs=epochs,
            channels=sum(mean.values()),
            used=sum(count * self.cost.channel_cost(shape) for shape, count in drawn),
            weight_saving=1 - sum(count * shape.channel_weights for shape, count in drawn) / weights,
            activation_saving=1 - sum(count * shape.in_positions for shape, count in drawn) / inputs,
            wgrad_flops_saving=1 - sum(count * shape.channel_wgrad_flops for shape, count in drawn) / flops,
        )

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
            return cls(shapes=shapes, pool=pool, head=head, cost=cost, policy=policy, **content)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: the plan is damaged ({error!r})") from error


def make_plan(
    ranking: Ranking,
    *,
    budget: int | str,
    coverage: float = 0.976,
    k: int | None = None,
    layers: Sequence[str] | None = None,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    activation_dtype: torch.dtype | None = None,
    cost_model: str = "exact",
    optimizer: str = "sgd",
    fill: str = "stop",
    seed: int = 0,
    train_bias: bool = False,
    train_norm: bool = False,
    policy: Policy = Policy(),  # noqa: B008  frozen
) -> Plan:
    """Choose the pool of layers and fix the budget.

    The layers of which a channel fits the budget are ordered by RGN under the plan's own cost. The pool is the
    shortest prefix that holds `coverage` of their RGN, or the first `k` of them, or exactly `layers`.

    Args:
        ranking: what `rank_layers` measured.
        budget: an integer counts elements for one sample, the paper's unit; a string such as "256KiB" or "1.5MB"
            counts the bytes of compact gradients and stores at the given batch size and dtypes.
        coverage: share of the summed RGN that the pool must hold; 0.976 gives the paper's 35 / 27 / 43 layers.
        k: number of layers, instead of `coverage`.
        layers: names of the pool, best first, instead of `coverage`.
        batch_size: samples whose inputs are stored at once (byte budgets only).
        dtype: of the weights and their gradients (byte budgets only).
        activation_dtype: of the stored inputs, such as torch.bfloat16 under autocast; by default `dtype`.
        cost_model: "exact", or "paper", which charges a depthwise channel one weight.
        optimizer: "sgd", "momentum" or "adamw": what will train, whose state of a drawn channel counts.
        fill: "stop" ends a draw at the first channel that does not fit, "skip" goes on to the next.
        seed: of all draws.
        train_bias: also train the biases of the ranked layers, outside the budget.
        train_norm: also train the weights and biases of normalisation layers, outside the budget.
        policy: what the frozen layers keep for the backward; the default is exact.

    Raises:
        ValueError: an option out of its range, an unknown layer name, or a budget that no channel of the pool fits.
    """
    if fill not in FILLS:
        raise ValueError(f"fill {fill!r}: wanted one of {', '.join(FILLS)}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed {seed!r}: wanted an integer")
    limit, in_bytes = parse_budget(budget)
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(f"optimizer {optimizer!r}: wanted one of {', '.join(OPTIMIZER_STATES)}")
    states = OPTIMIZER_STATES[optimizer]
    cost = CostModel(depthwise=cost_model, states=states)
    if in_bytes:
        sizes = dtype.itemsize, (activation_dtype or dtype).itemsize
        state_size = max(dtype.itemsize, 4) if states else 1
        cost = CostModel(batch_size, *sizes, "bytes", cost_model, states, state_size)
    shapes = {layer.name: layer.shape for layer in ranking.layers}
    if layers is not None:
        _check_names(layers, shapes)
    _check_budget(limit, {name: cost.channel_cost(shapes[name]) for name in layers or shapes}, cost.unit)
    pool = tuple(layers) if layers is not None else _choose_pool(ranking, cost, limit, coverage, k)
    return Plan(shapes, pool, ranking.head, limit, cost, fill, seed, train_bias, train_norm, policy)


def parse_budget(budget: int | str) -> tuple[int, bool]:
    """(amount, whether it counts bytes): 27946 -> (27946, False), "256KiB" -> (262144, True)."""
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget, False
    pattern = r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b)\s*"
    match = re.fullmatch(pattern, budget, re.IGNORECASE) if isinstance(budget, str) else None
    if match and match[2].upper() in _BYTES and float(match[1]) > 0:
        return int(float(match[1]) * _BYTES[match[2].upper()]), True
    raise ValueError(f"budget {budget!r}: wanted a positive integer (elements, one sample) or bytes such as '256KiB'")


def _choose_pool(ranking: Ranking, cost: CostModel, budget: int, coverage: float, k: int | None) -> tuple[str, ...]:
    rgn = {layer.name: layer.rgn(cost) for layer in ranking.layers if cost.channel_cost(layer.shape) <= budget}
    order = [name for name in ranking.order(cost) if name in rgn]
    if k is not None:
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(order):
            raise ValueError(f"k {k!r}: wanted an integer from 1 to the {len(order)} layers of which a channel fits")
        return tuple(order[:k])
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage {coverage!r}: wanted a share in (0, 1]")
    wanted = coverage * math.fsum(rgn.values())
    for count in range(1, len(order)):
        if math.fsum(rgn[name] for name in order[:count]) >= wanted:
            return tuple(order[:count])
    return tuple(order)


def _check_names(layers: Sequence[str], shapes: Mapping[str, LayerShape]) -> None:
    unknown = [name for name in layers if name not in shapes]
    if unknown or not layers or len(set(layers)) != len(layers):
        raise ValueError(
            f"layers {list(layers)}: wanted distinct names out of the ranking's {len(shapes)} layers; unknown: "
            f"{unknown or 'none'}"
        )


def _check_budget(budget: int, costs: Mapping[str, int], unit: str) -> None:
    cheapest = min(costs, key=lambda name: costs[name])
    if budget < costs[cheapest]:
        raise ValueError(
            f"budget of {budget} {unit} fits no channel: the smallest workable budget is {costs[cheapest]} {unit}, one "
            f"channel of layer {cheapest!r}"
        )
