"""The plan for a budget of channels: the options are checked, the pool is chosen, the budget is settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from trady_triton.arguments import expect
from trady_triton.budget import check_fits, check_ratios, read_budget, settled_budget
from trady_triton.cost import OPTIMIZER_STATES, CostModel, LayerShape
from trady_triton.plan import Plan
from trady_triton.policy import Policy
from trady_triton.pooling import choose_pool
from trady_triton.ranking import Ranking
from trady_triton.sampling import FILLS, Pool
from trady_triton.strategies import strategy


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
