"""The search behind make_plan(memory=...): the gentlest way to train, and the largest budget, that stay within it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trady_triton.batch import Batch, Shape, first_of, num_samples, samples_in
from trady_triton.budget import parse_budget
from trady_triton.budget_plan import make_plan
from trady_triton.choose import choose_recompute
from trady_triton.microbatch import check_micro_batch
from trady_triton.nn.parts import can_part
from trady_triton.plan import Plan
from trady_triton.policy import Policy
from trady_triton.promise import bound
from trady_triton.ranking import Ranking
from trady_triton.rehearsal import Loss, Step, fake_copy, fake_step

WAYS = ("recompute", "micro_batch", "store", "activations", "frontier")
EXACT = ("recompute", "micro_batch")
ENOUGH = 0.1  # the share of its pool that a budget should pay for before something is given up for more


def fit_memory(
    model: nn.Module,
    ranking: Ranking,
    *,
    memory: int | str,
    input_shape: Shape,
    allow: Collection[str] = EXACT,
    micro_batch: int | None = None,
    target: Batch | None = None,
    loss_fn: Loss = F.cross_entropy,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> Plan:
    """The plan with the largest budget of channels whose every step stays within `memory`.

    All counts: weights, batch, activations, gradients, update; see `bound`. Where a step as it was asked for would
    leave less than a tenth of its pool to be paid for, something is given up, the gentlest first:

    - "recompute": what `choose_recompute` picks runs twice, in its parts. Exact; up to a forward more of time.
    - "micro_batch": N/2, N/4, ... 1 samples at a time, if they do not see each other. Exact; smaller products. Train
      with `backward_in_parts`, or accumulate alike.
    - "store": the drawn channels in int8, without bias in their gradient, an error of some 0.5 %.
    - "activations": 8 bits, an error of some 0.3 % a layer.
    - "store" once more: in int4, an error of some 10 %.
    - "frontier": the pool loses its earliest quarter, half, three quarters of layers, and with them what they keep.

    If even that leaves less, the way that needs least memory is taken.

    Args:
        model: the model that was ranked; it is not touched.
        ranking: what `rank_layers` measured.
        memory: bytes, or a string such as "2GiB".
        input_shape: of the whole batch, as for `ledger`.
        allow: what may be given up, out of the five; by default what is exact.
        micro_batch: samples at a time, if the choice is not left to the search.
        target, loss_fn, autocast: as for `ledger`.
        options: others of `make_plan`; budget, batch size and dtypes are set here.

    Raises:
        ValueError: it cannot be done in so little memory: the message names the smallest figure that works with what
            is allowed.
    """
    limit = parse_memory(memory)
    _check(allow, options)
    check_micro_batch(micro_batch)
    if micro_batch is not None:
        allow = set(allow) - {"micro_batch"}
    sizes = _divisions(samples_in(input_shape), model, options) if "micro_batch" in allow else [micro_batch]
    policies = _policies(model, ranking, input_shape, sizes, autocast, "recompute" in allow, options)
    searches: list[_Search] = []
    with fake_copy(model) as twin:
        steps = [
            fake_step(twin, input_shape, target=target, loss_fn=loss_fn, autocast=autocast, micro_batch=size)
            for size in sizes
        ]
        runs = [(step, policy) for step in steps for policy in policies[step.micro_batch]]
        for way, packing in _ways(ranking, set(allow), options):
            for step, policy in runs:
                search = _Search(twin, ranking, step, limit, {**way, "policy": replace(policy, **packing)})
                if search.fits(search.enough):
                    return search.largest()
                searches.append(search)
        leanest = sorted(searches, key=lambda search: search.overhead)[:3]
        best = min(leanest, key=lambda search: search.at(search.cheapest))
        if best.fits(best.cheapest):
            return best.largest()
    least = best.at(best.cheapest)
    more = ", ".join(way for way in WAYS if way not in allow and (way != "micro_batch" or micro_batch is None))
    raise ValueError(
        f"memory of {limit:,} bytes: no channel can be trained in it; the smallest workable memory is {least} bytes "
        f"({least / 2**20:.2f} MiB), at {best.micro_batch} of {samples_in(input_shape)} samples at a time, allowing "
        f"{', '.join(sorted(allow)) or 'nothing'}" + (f"; {more} could be allowed as well" if more else "")
    )


def parse_memory(memory: int | str) -> int:
    """Bytes: 1048576 or "1MiB"."""
    try:
        return parse_budget(memory)[0]
    except ValueError as error:
        raise ValueError(f"memory {memory!r}: wanted bytes, as a positive integer or such as '2GiB'") from error


class _Search:
    """The largest budget for one way and one size of the micro-batch, in a handful of fake steps.

    `cheapest` is the smallest budget that makes a plan, `enough` what a share of the pool costs that is worth a step,
    `everything` what all of it costs.
    """

    def __init__(self, model: nn.Module, ranking: Ranking, step: Step, limit: int, options: dict[str, Any]) -> None:
        self.model, self.ranking, self.step, self.limit, self.options = model, ranking, step, limit, options
        self.micro_batch = num_samples(step.part[0])
        self._bounds: dict[int, int] = {}
        whole = self.plan(2**62)
        costs = {name: whole.cost.channel_cost(shape) for name, shape in whole.shapes.items()}
        allowed = sorted(costs[name] for name in options.get("layers") or costs)
        self.cheapest = allowed[(options.get("k") or 1) - 1]
        self.everything = whole.pool_cost
        self.enough = max(self.cheapest, int(ENOUGH * self.everything))

    @property
    def overhead(self) -> int:
        """Bytes of a step beyond its budget, once something was tried."""
        return min(size - budget for budget, size in self._bounds.items())

    def plan(self, budget: int) -> Plan:
        """The plan of a budget in bytes."""
        dtype = max((p.dtype for p in self.model.parameters() if p.is_floating_point()), key=lambda d: d.itemsize)
        made = make_plan(
            self.ranking,
            budget=f"{budget}B",
            batch_size=self.micro_batch,
            dtype=dtype,
            activation_dtype=self.step.autocast,
            **self.options,
        )
        return replace(made, memory=self.limit, micro_batch=self.step.micro_batch)

    def at(self, budget: int) -> int:
        """Bytes that no step of the budget's plan exceeds."""
        if budget not in self._bounds:
            self._bounds[budget] = bound(self.model, self.plan(budget), self.step)
        return self._bounds[budget]

    def fits(self, budget: int) -> bool:
        """Whether every step of the budget's plan stays within the limit."""
        return self.at(budget) <= self.limit

    def largest(self) -> Plan:
        """The plan of the largest budget that fits, to some two hundredths; one that fits is known.

        What the bound adds to the budget grows with it, so the next budget to try is what the last one's addition
        leaves of the limit; where that lies outside what is still open, the middle of it.
        """
        base = fits = max(budget for budget, size in self._bounds.items() if size <= self.limit)
        fails = self.everything + 1
        for _ in range(8):
            if fails - fits <= 1 + fits // 50:
                break
            budget = min(self.limit - (self.at(base) - base), self.everything)
            base = budget if fits < budget < fails else isqrt(fits * fails)
            if self.fits(base):
                fits = base
            else:
                fails = base
        return self.plan(fits)


def _check(allow: Collection[str], options: Mapping[str, Any]) -> None:
    if isinstance(allow, str) or (strange := sorted(set(allow) - set(WAYS))):
        raise ValueError(f"allow {allow if isinstance(allow, str) else strange!r}: wanted some of {', '.join(WAYS)}")
    if options.get("cost_model", "exact") != "exact":
        raise ValueError(f"cost_model {options['cost_model']!r}: a promise of memory needs the exact costs")


def _ways(
    ranking: Ranking, allow: Collection[str], options: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Options of make_plan, and what they change of the policy, from the gentlest on."""
    packing: dict[str, Any] = {}
    yield options, packing
    may_round = "store" in allow and options.get("store", "same") == "same"
    if may_round:
        options = {**options, "store": "int8"}
        yield options, packing
    if "activations" in allow and options.get("policy", Policy()).is_exact:
        packing = {"activations": 8}
        yield options, packing
    if may_round:
        options = {**options, "store": "int4"}
        yield options, packing
    if "frontier" in allow and not isinstance(options.get("layers"), Mapping):
        for pool in _later_pools(ranking, options):
            yield {**options, "layers": pool, "k": None, "coverage": None}, packing


def _policies(
    model: nn.Module,
    ranking: Ranking,
    input_shape: Shape,
    sizes: list[int | None],
    autocast: torch.dtype | None,
    may_recompute: bool,
    options: dict[str, Any],
) -> dict[int | None, list[Policy]]:
    """Size of the micro-batch -> the policy that was asked for and, if it may, what `choose_recompute` makes of it.

    What is chosen for the first size holds for all but the last one, a single sample, which cannot be parted.
    """
    asked = options.get("policy", Policy())
    if not may_recompute:
        return {size: [asked] for size in sizes}
    chosen = {}
    for size in (sizes[0], sizes[-1]):
        shape = first_of(input_shape, size)
        whole = make_plan(ranking, budget=f"{2**62}B", batch_size=samples_in(shape), **options)
        plan = replace(whole, budget=max(whole.cost.channel_cost(whole.shapes[name]) for name in whole.pool))
        chosen[size] = choose_recompute(plan, model, shape, autocast=autocast).policy
    return {size: [asked, chosen[size if size == sizes[-1] else sizes[0]]] for size in sizes}


def _later_pools(ranking: Ranking, options: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The pool without its earliest quarter, half, three quarters, each best first."""
    whole = make_plan(ranking, budget=f"{2**62}B", **options)
    forward = [name for name in whole.shapes if name in whole.pool]
    for dropped in (1, 2, 3):
        later = set(forward[dropped * len(forward) // 4 :])
        if 0 < len(later) < len(forward):
            yield tuple(name for name in whole.pool if name in later)


def _divisions(batch_size: int, model: nn.Module, options: Mapping[str, Any]) -> list[int | None]:
    """Sizes of the micro-batch to try, None for the whole; only that where samples see each other."""
    if not can_part(model, options.get("policy", Policy())):
        return [None]
    sizes: list[int | None] = [None]
    while batch_size > 1:
        batch_size = (batch_size + 1) // 2
        sizes.append(batch_size)
    return sizes
