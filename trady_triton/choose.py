"""Which parts of a network to run twice: fewest bytes kept, at the lowest peak, where that is worth a second forward.

One step is traced on fake tensors, which allocate nothing (`trace`). Whatever is recomputed, what lives at any moment
is the sum of what the forward has kept up to there and of what the running code needs. So the least kept up to a
point is best for all that follows, and the choice is a shortest path along the forward: from point to point either as
it is, or over a unit, which keeps its inputs alone and has to find room when it runs again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil

import torch
from torch import Tensor, nn

from trady_triton.arguments import expect
from trady_triton.batch import Shape, made_to, samples_in
from trady_triton.nn.chain import links_of, run_name
from trady_triton.nn.parts import can_part
from trady_triton.plan import Plan
from trady_triton.policy import ACTIVATIONS
from trady_triton.rehearsal import fake_copy, train_under, trained_by
from trady_triton.trace import Call, Trace, trace_step

PRICE = 0.04  # bytes that a unit must spare for each byte that it writes again: a mask is a bit for 4 to 12 bytes
SLACK = 1.05  # peaks that differ by less are alike
PARTS = (1, 2, 4)
LEAST_PART = 4  # samples


def choose_recompute(
    plan: Plan,
    model: nn.Module,
    input_shape: Shape,
    scores: Mapping[str, Tensor] | None = None,
    autocast: torch.dtype | None = None,
) -> Plan:
    """The plan, with a policy that recomputes what is worth it, and in as many parts as the peak asks for. Exact.

    A unit is a module of any size, or a run of a Sequential's children. The units chosen do not overlap, so by them
    nothing runs more than twice. Of all choices whose step peaks, to 5 %, no higher than inference, or than the lowest
    peak that any choice has, they keep the fewest bytes; what units write again, which is about their time, counts as a
    twenty-fifth of bytes kept, and every unit spares at least that. Packing leaves less to be spared, so that it could
    keep more than the choice for more bits: what is worth its time there may run twice here too, if that keeps less.

    If that peak is above inference, units run in 2 or 4 parts of the batch, of at least 4 samples, as smaller ones take
    long; unless the policy has a number of parts already, or samples may see each other.

    Args:
        plan: with any policy; under batch_norm "train" nothing can run twice and none is chosen.
        model: the model of the plan; it is not touched.
        input_shape: counts the batch, (8, 3, 224, 224), or is a mapping of tensors of the batch's shapes and dtypes.
        scores: for the draw of epoch 0, at which all is measured, where the sampler cannot draw without.
        autocast: dtype of torch.autocast around the forward.
    """
    expect("plan", plan, Plan)
    expect("model", model, nn.Module)
    if plan.policy.batch_norm == "train":
        return plan
    asked, options = replace(plan.policy, recompute=()), (model, input_shape, scores, autocast)
    trace, samples = _trace(replace(plan, policy=asked), *options), samples_in(input_shape)
    calls = [call for call in (*trace.calls, *_runs(model, trace)) if _can_run_again(call, plan)]
    finer = [parts for parts in PARTS if asked.recompute_parts == 1 < parts <= samples / LEAST_PART]
    counts = [asked.recompute_parts, *(finer if can_part(model, asked) else ())]
    choice = _choose_apart(trace, calls, samples, counts)
    if not asked.is_exact:
        gentler = replace(asked, activations=ACTIVATIONS[ACTIVATIONS.index(asked.activations) - 1])
        worth = choose_recompute(replace(plan, policy=gentler), *options).policy
        calls = [replace(call, is_worth_it=call.name in worth.recompute) for call in calls]
        counts = [parts for parts in counts if parts >= worth.recompute_parts]
        choice = min(choice, _choose_apart(trace, calls, samples, counts), key=lambda choice: choice.kept)
    return replace(plan, policy=replace(asked, recompute=choice.names, recompute_parts=choice.parts))


def _trace(
    plan: Plan, model: nn.Module, input_shape: Shape, scores: Mapping[str, Tensor] | None, autocast: torch.dtype | None
) -> Trace:
    drawn = plan.sample(0, scores)
    with fake_copy(model) as twin:
        trained = trained_by(train_under(twin, plan, drawn))
        inputs = made_to(input_shape, next(p for p in twin.parameters() if p.is_floating_point()))
        return trace_step(twin, trained, inputs, autocast)


@dataclass(frozen=True)
class _Choice:
    names: tuple[str, ...]
    parts: int
    kept: float  # bytes
    lowest: int  # bytes, of the peak


@dataclass(frozen=True)
class _Unit:
    """A call that may run again: bytes that it keeps then, that it needs while it runs, and that it pays for."""

    name: str
    start: int
    keeps: int
    needs: int
    writes: int


# Cost and bytes kept up to a point, and the unit that ends there.
_Way = tuple[float, float, _Unit | None]


def _choose_apart(trace: Trace, calls: list[Call], samples: int, counts: Sequence[int]) -> _Choice:
    """The choice of units none of which runs within another, as one may that is called again, elsewhere."""
    choice = _in_fewest_parts(trace, calls, samples, counts)
    inner = _nested(calls, choice.names)
    return _choose_apart(trace, [c for c in calls if c.name not in inner], samples, counts) if inner else choice


def _in_fewest_parts(trace: Trace, calls: list[Call], samples: int, counts: Sequence[int]) -> _Choice:
    """In the first of these numbers of parts that peaks as inference does, or than which the next is no better."""
    coarsest, *finer = counts
    choice = _choose(trace, calls, samples, coarsest)
    for parts in finer:
        if choice.lowest <= SLACK * trace.inference_peak:
            break
        other = _choose(trace, calls, samples, parts)
        if other.lowest * SLACK > choice.lowest:
            break
        choice = other
    return choice


def _choose(trace: Trace, calls: list[Call], samples: int, parts: int) -> _Choice:
    paths = _Paths(trace, calls, samples, parts)
    as_it_is = max(max(stretch.forward, stretch.backward) for stretch in trace.stretches)
    lowest = min(paths.lowest_peak(), as_it_is)  # the former counts what is kept and in use twice
    limit = int(SLACK * max(lowest, trace.inference_peak))
    # What it spares for its price may keep more up to some point than the limit allows.
    found = paths.cheapest(limit, PRICE) or paths.cheapest(limit, 0.0) or (paths.kept[-1], ())
    return _Choice(found[1], parts, found[0], lowest)


class _Paths:
    """The ways through the stretches of a trace, each as it is or inside a unit."""

    def __init__(self, trace: Trace, calls: list[Call], samples: int, parts: int) -> None:
        self.stretches = trace.stretches
        self.inference_peak = trace.inference_peak
        self.share = ceil(samples / parts) / samples
        self.kept = [0, *accumulate(stretch.kept for stretch in self.stretches)]
        self.needs = [
            max(stretch.inference, max(stretch.forward, stretch.backward) - kept)
            for stretch, kept in zip(self.stretches, self.kept, strict=False)
        ]
        self.units: dict[int, list[_Unit]] = {}
        for call in calls:
            spares = self.kept[call.stop] - self.kept[call.start] - call.inputs
            if spares > 0 < call.inputs and (parts == 1 or call.is_parted):
                unit = self._unit(call)
                if spares >= PRICE * unit.writes:
                    self.units.setdefault(call.stop, []).append(unit)

    def cheapest(self, limit: int, price: float) -> tuple[float, tuple[str, ...]] | None:
        """Of the ways within a peak that with the fewest bytes kept, plus `price` for each that is written again.

        Bytes kept and names of the units; None if no way stays within it.
        """
        best: list[_Way] = [(0.0, 0.0, None)]
        for stop, (stretch, needs) in enumerate(zip(self.stretches, self.needs, strict=True), 1):
            cost, kept, _ = best[-1]
            fits = kept + needs <= limit
            ways: list[_Way] = [(cost + stretch.kept, kept + stretch.kept, None)] if fits else []
            for unit in self.units.get(stop, ()):
                cost, kept, _ = best[unit.start]
                if kept + unit.needs <= limit:
                    ways.append((cost + unit.keeps + price * unit.writes, kept + unit.keeps, unit))
            best.append(min(ways, key=lambda way: way[0], default=(float("inf"), float("inf"), None)))
        cost, kept, _ = best[-1]
        return None if cost == float("inf") else (kept, tuple(dict.fromkeys(_names(best))))

    def lowest_peak(self) -> int:
        """The lowest peak of all ways, to a hundredth."""
        low, high = 0, self.kept[-1] + max(self.needs)
        while high - low > high // 100:
            middle = (low + high) // 2
            if self.cheapest(middle, 0.0) is None:
                low = middle
            else:
                high = middle
        return high

    def _unit(self, call: Call) -> _Unit:
        """What a call costs as a unit: in the forward it runs as in inference, and in the backward once more."""
        inside, kept = self.stretches[call.start : call.stop], self.kept[call.start]
        arrived = self._arrived(call)
        forward = max(stretch.inference for stretch in inside)
        again = max(
            arrived + max(stretch.forward for stretch in inside) - kept,
            max(stretch.backward for stretch in inside) - kept + call.unkept,
        )
        if self.share < 1:
            forward = self._parted_forward(call, forward)
            again = self._parted_again(call, again, arrived)
        writes = 0 if call.is_worth_it else sum(stretch.written for stretch in inside)
        return _Unit(call.name, call.start, call.inputs, max(forward, again), writes)

    def _arrived(self, call: Call) -> int:
        """What lives when the backward of a call begins, beyond what is kept up to there: gradients."""
        for place in reversed(range(call.start, call.stop)):
            if arrival := self.stretches[place].arrival:
                return arrival - self.kept[place + 1]
        return call.outputs

    def _parted_forward(self, call: Call, forward: int) -> int:
        """The outputs of parts pile up while the working set is that of one; in the end they are concatenated."""
        before = max(call.inputs, call.before - self.kept[call.start])
        return before + call.outputs + max(call.outputs, int((forward - before) * self.share))

    def _parted_again(self, call: Call, again: int, arrived: int) -> int:
        """So do the gradients of the inputs' parts; those of what is trained are whole, and a part's is added to them.

        Whole are also the inputs and what arrived.
        """
        made = [stretch.gradients for stretch in self.stretches[call.start : call.stop]]
        fixed = arrived + call.inputs + sum(made)
        return fixed + max(made) + call.inputs + max(call.inputs, int((again - fixed) * self.share))


def _names(best: list[_Way]) -> Iterator[str]:
    """The units on the way that ends the list, first one first."""
    found, at = [], len(best) - 1
    while at:
        unit = best[at][2]
        if unit is not None:
            found.append(unit.name)
        at = at - 1 if unit is None else unit.start
    return reversed(found)


def _can_run_again(call: Call, plan: Plan) -> bool:
    in_head = any(call.name == head or call.name.startswith(head + ".") for head in plan.head)
    return call.name != "" and not in_head and call.is_pure and not call.is_stateful


def _nested(calls: list[Call], names: tuple[str, ...]) -> set[str]:
    """Those of the units that are called within another one."""
    chosen = [call for call in calls if call.name in names]
    return {
        inner.name
        for outer in chosen
        for inner in chosen
        if inner.name != outer.name and outer.start <= inner.start and inner.stop <= outer.stop
    }


def _runs(model: nn.Module, trace: Trace) -> Iterator[Call]:
    """Runs of two or more links of every chain, as if each were a call."""
    times = Counter(call.name for call in trace.calls)
    calls = {call.name: call for call in trace.calls if times[call.name] == 1}
    names = {module: name for name, module in model.named_modules()}
    for chain in calls:
        links = [_within(calls[chain], calls.get(names[link])) for link in links_of(model.get_submodule(chain))]
        for first, start in enumerate(links):
            for last, stop in enumerate(links[first + 1 :], first + 1):
                if start is None or stop is None:
                    break
                inside = [link for link in links[first : last + 1] if link is not None]
                yield replace(
                    start,
                    name=run_name(chain, first, last + 1),
                    stop=stop.stop,
                    outputs=stop.outputs,
                    is_parted=start.is_parted and stop.is_parted,
                    is_stateful=any(link.is_stateful for link in inside),
                )


def _within(outer: Call, inner: Call | None) -> Call | None:
    """The inner call, if it is a part of the outer one: a Sequential's children may be called without it."""
    return inner if inner is not None and outer.start < inner.start and inner.stop < outer.stop else None
