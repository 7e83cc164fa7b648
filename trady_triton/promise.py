"""The bound on a step: bytes that no step of any epoch under a plan exceeds.

It on a step holds for every draw, because it does not look at one. A fake step is run in which each layer of
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

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from trady_triton.batch import num_samples, tensors
from trady_triton.meters import LiveStorages, storage_bytes
from trady_triton.nn import remove_plan
from trady_triton.plan import Plan
from trady_triton.rehearsal import Step, slots_of, train_under
from trady_triton.slot import ChannelSlot


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
