"""The promise: a budget of channels such that no step of any epoch takes more memory than was allowed.

The bound on a step holds for every draw, because it does not look at one. A fake step is run in which each layer of
the pool has as many channels as the budget B could pay for if it were spent on that layer alone: every working buffer
of every layer is then at its largest, and the backward reaches the deepest layer of the pool. Of its timeline the
stores and gradients of the drawn channels are left out; instead B is added, which is what they sum to at most (or what
the whole pool costs, if that is less).

    bound(B) = weights + buffers + batch + optimizer state + ids of the channels + peak of that timeline + B
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from trady_triton.batch import Batch, Shape, num_samples, samples_in, tensors
from trady_triton.meters import LiveStorages, storage_bytes
from trady_triton.nn import remove_plan
from trady_triton.plan import Plan, make_plan, parse_budget
from trady_triton.policy import Policy
from trady_triton.ranking import Ranking
from trady_triton.rehearsal import Loss, Step, fake_copy, fake_step, slots_of, train_under
from trady_triton.slot import ChannelSlot

ENOUGH = 0.1  # the share of its pool that a budget should pay for before a batch is left whole


def fit_memory(
    model: nn.Module,
    ranking: Ranking,
    *,
    memory: int | str,
    input_shape: Shape,
    micro_batch: int | None = None,
    target: Batch | None = None,
    loss_fn: Loss = F.cross_entropy,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> Plan:
    """The plan with the largest budget of channels whose every step stays within `memory`.

    All counts: weights, batch, activations, gradients, update; see `bound`. The batch is split where that is exact
    and needed: the largest of N, N/2, N/4, ... 1 samples at a time with which the budget pays for a tenth of its pool,
    or else 1, with which it pays for most. Train with `backward_in_parts`, or accumulate alike.

    Args:
        model: the model that was ranked; it is not touched.
        ranking: what `rank_layers` measured.
        memory: bytes, or a string such as "2GiB".
        input_shape: of the whole batch, as for `ledger`.
        micro_batch: samples at a time, if the choice is not left to the search.
        target, loss_fn, autocast: as for `ledger`.
        options: others of `make_plan`; budget, batch size and dtypes are set here.

    Raises:
        ValueError: it cannot be done in so little memory: the message names the smallest figure that works.
    """
    limit = parse_memory(memory)
    if options.get("cost_model", "exact") != "exact":
        raise ValueError(f"cost_model {options['cost_model']!r}: a promise of memory needs the exact costs")
    samples = samples_in(input_shape)
    with fake_copy(model) as twin:
        for size in _divisions(samples, twin, options) if micro_batch is None else [micro_batch]:
            step = fake_step(twin, input_shape, target=target, loss_fn=loss_fn, autocast=autocast, micro_batch=size)
            search = _Search(twin, ranking, step, limit, options)
            if search.fits(search.enough):
                return search.largest()
        if search.fits(search.cheapest):
            return search.largest()
    least = search.bounds[search.cheapest]
    raise ValueError(
        f"memory of {limit:,} bytes: no channel can be trained in it; the smallest workable memory is {least} bytes "
        f"({least / 2**20:.2f} MiB), at {search.micro_batch} of {samples} samples at a time"
    )


def bound(model: nn.Module, plan: Plan, step: Step) -> int:
    """Bytes that no step under the plan exceeds, whatever the draw; the model is one of `fake_copy`.

    Counted as the meters count: storages, not the private buffers of an operation.
    """
    costs = {name: plan.cost.channel_cost(plan.shapes[name]) for name in plan.pool}
    most = {name: range(min(plan.shapes[name].in_channels, plan.budget // cost)) for name, cost in costs.items()}
    optimizer = train_under(model, plan, most, weight_decay=1.0)
    slots = slots_of(model)
    two_parts = 2 * num_samples(step.part[0])  # a third would only repeat the second
    inputs, target = step.first(two_parts)
    short = replace(step, inputs=inputs, target=target)
    with _Timeline() as timeline, _without_channels(model, plan, slots, timeline):
        short.backward(model)
        optimizer.step()
    optimizer.zero_grad()
    whole = [value for parameter in model.parameters() for value in optimizer.state.get(parameter, {}).values()]
    existing = storage_bytes(
        [*model.parameters(), *model.buffers(), *whole, *tensors(step.inputs), *tensors(step.target)]
    )
    channels = min(sum(map(len, most.values())), plan.budget // min(costs.values()))
    numbers = 12 if plan.cost.states == 2 else 8  # bytes of a channel's id, and of its count of AdamW steps
    draws = numbers * channels + storage_bytes(slot.proxy for slot in slots)
    remove_plan(model)
    total: int = existing + draws + timeline.peak() + min(plan.budget, plan.pool_cost)
    return total


def parse_memory(memory: int | str) -> int:
    """Bytes: 1048576 or "1MiB"."""
    try:
        return parse_budget(memory)[0]
    except ValueError as error:
        raise ValueError(f"memory {memory!r}: wanted bytes, as a positive integer or such as '2GiB'") from error


class _Search:
    """The largest budget for one size of the micro-batch, in a handful of fake steps.

    `bounds` holds what was found so far, budget -> bytes. `cheapest` is the smallest budget that makes a plan,
    `enough` what a share of the pool costs that is worth a step, `everything` what all of it costs.
    """

    def __init__(self, model: nn.Module, ranking: Ranking, step: Step, limit: int, options: dict[str, Any]) -> None:
        self.model, self.ranking, self.step, self.limit, self.options = model, ranking, step, limit, options
        self.micro_batch = num_samples(step.part[0])
        self.bounds: dict[int, int] = {}
        whole = self.plan(2**62)
        costs = {name: whole.cost.channel_cost(shape) for name, shape in whole.shapes.items()}
        allowed = sorted(costs[name] for name in options.get("layers") or costs)
        self.cheapest = allowed[(options.get("k") or 1) - 1]
        self.everything = whole.pool_cost
        self.enough = max(self.cheapest, int(ENOUGH * self.everything))

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

    def fits(self, budget: int) -> bool:
        """Whether every step of the budget's plan stays within the limit."""
        self.bounds[budget] = bound(self.model, self.plan(budget), self.step)
        return self.bounds[budget] <= self.limit

    def largest(self) -> Plan:
        """The plan of the largest budget that fits, to some two hundredths; one that fits is known.

        What the bound adds to the budget grows with it, so the next budget to try is what the last one's addition
        leaves of the limit; where that lies outside what is still open, the middle of it.
        """
        base = fits = max(budget for budget, size in self.bounds.items() if size <= self.limit)
        fails = self.everything + 1
        for _ in range(8):
            if fails - fits <= 1 + fits // 50:
                break
            budget = min(self.limit - (self.bounds[base] - base), self.everything)
            base = budget if fits < budget < fails else isqrt(fits * fails)
            if self.fits(base):
                fits = base
            else:
                fails = base
        return self.plan(fits)


class _Timeline(LiveStorages):  # type: ignore[no-untyped-call]
    """When each storage was made and freed, so that some can be left out of the peak afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[int, int]] = []
        self._serials: dict[int, int] = {}
        self._left_out: set[int] = set()

    def leave_out(self, tensor: Tensor) -> None:
        """Let the storage of a tensor not count."""
        self._left_out.add(self._serials[tensor.untyped_storage()._cdata])

    def peak(self) -> int:
        """The most that lived at once of what counts."""
        sizes = (size for serial, size in self._events if serial not in self._left_out)
        return max(accumulate(sizes), default=0)

    def _know(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        if storage._cdata not in self._known:
            self._serials[storage._cdata] = len(self._events)
            self._events.append((len(self._events), nbytes))
        super()._know(storage, nbytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._events.append((self._serials.pop(key), -nbytes))
        super()._forget(key, nbytes)


@contextmanager
def _without_channels(model: nn.Module, plan: Plan, slots: list[ChannelSlot], timeline: _Timeline) -> Iterator[None]:
    """Leave the drawn channels' stores and gradients out of a timeline.

    Of what a layer with a slot saves, that is what is no larger than the plan charges for it. Stores inside a
    recomputed module are made during the backward and stay in the timeline: they count twice, to the safe side.
    """
    running: list[nn.Module] = []

    def pack(tensor: Tensor) -> Tensor:
        slot = getattr(running[-1], "slot", None) if running else None
        if isinstance(slot, ChannelSlot):
            charged = slot.channels.numel() * plan.cost.activation_cost(plan.shapes[slot.layer])
            if tensor is not slot.weight and tensor.untyped_storage().nbytes() <= charged:
                timeline.leave_out(tensor)
        return tensor

    with ExitStack() as exits:
        for module in model.modules():
            exits.callback(module.register_forward_pre_hook(lambda m, args: running.append(m)).remove)
            exits.callback(module.register_forward_hook(lambda m, args, y: _pop(running), always_call=True).remove)
        for slot in (slot for slot in slots if slot.proxy.requires_grad):
            add_hook = slot.proxy.register_post_accumulate_grad_hook
            hook = add_hook(lambda proxy: timeline.leave_out(proxy.grad))  # type: ignore[no-untyped-call]
            exits.callback(hook.remove)
        exits.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        yield


def _pop(running: list[nn.Module]) -> None:
    running.pop()


def _divisions(batch_size: int, model: nn.Module, options: dict[str, Any]) -> list[int | None]:
    """Sizes of the micro-batch to try, None for the whole; only that where samples see each other."""
    policy = options.get("policy", Policy())
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if norms and (policy.batch_norm == "train" or any(norm.running_mean is None for norm in norms)):
        return [None]
    sizes: list[int | None] = [None]
    while batch_size > 1:
        batch_size = (batch_size + 1) // 2
        sizes.append(batch_size)
    return sizes
