"""Scores of channels between draws: what a sampler saw while its channels were trained, or was given.

Shapes: C input channels of a layer, K of them drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trady_triton.plan import Plan
from trady_triton.ranking import channel_norms
from trady_triton.sampling import Scores
from trady_triton.sharding import whole
from trady_triton.slot import ChannelSlot


class ChannelScores:
    """The scores of the draw that is installed (`kept`), and the sums from which those of the next one will be made.

    For samplers that go by gradient norms seen in training: each step adds the squared norm of every drawn channel's
    compact gradient, as step() finds it (clipped by the loop, not yet by `max_grad_norm`); a channel's score is the
    root of their mean over the steps since the draw. Channels that were never drawn have the largest score of the
    first epoch.
    """

    def __init__(self, plan: Plan) -> None:
        self.source = plan.strategy.scores
        self.is_static = plan.strategy.is_static
        self.kept: dict[str, Tensor] | None = None
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    def see(self, slots: Iterable[ChannelSlot]) -> None:
        """Add the gradients that wait in the slots."""
        if self.source != "seen":
            return
        for slot in slots:
            if slot.proxy.grad is not None:
                squares = slot.proxy.grad.flatten(1).float().square().sum(1)
                self._sums[slot.layer] = self._sums[slot.layer] + squares if slot.layer in self._sums else squares
                self._steps[slot.layer] = self._steps.get(slot.layer, 0) + 1

    def following(self, slots: Iterable[ChannelSlot], given: Scores | None) -> dict[str, Tensor] | None:
        """The scores of the next draw: those given, or those seen, or norms of the weights; nothing is changed."""
        if self.is_static and self.kept is not None:
            return self.kept
        if given is not None:
            return {name: values.detach().cpu() for name, values in given.items()}
        slots = list(slots)
        if self.source == "weights":
            weights = {slot.layer: (whole(slot.weight.detach()), slot.groups) for slot in slots}
            return {name: channel_norms(*weight).double().cpu() for name, weight in weights.items()}
        if self._sums:
            return self._merged(slots)
        return self.kept if self.source == "seen" else None

    def settle(self, scores: dict[str, Tensor] | None) -> None:
        """A draw by these scores was installed."""
        self.kept, self._sums, self._steps = scores, {}, {}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Forget what is seen inside the block."""
        sums, steps = dict(self._sums), dict(self._steps)
        try:
            yield
        finally:
            self._sums, self._steps = sums, steps

    def state(self) -> dict[str, Any]:
        """Tensors and numbers for a state_dict; empty for samplers without scores."""
        if self.kept is None and not self._sums:
            return {}
        return {"kept": dict(self.kept or {}), "sums": dict(self._sums), "steps": dict(self._steps)}

    def load(self, state: Mapping[str, Any], slots: Iterable[ChannelSlot]) -> None:
        """Restore what `state` gave, on the devices of the slots."""
        kept = {name: values.cpu() for name, values in state.get("kept", {}).items()}  # a loader may have moved them
        self.settle(kept or None)
        for slot in slots:
            if slot.layer in state.get("sums", {}):
                self._sums[slot.layer] = state["sums"][slot.layer].to(slot.weight.device)
                self._steps[slot.layer] = state["steps"][slot.layer]

    def _merged(self, slots: list[ChannelSlot]) -> dict[str, Tensor]:
        fresh = {name: (total.double() / self._steps[name]).sqrt().cpu() for name, total in self._sums.items()}
        if self.kept is None:
            best = max(float(values.max()) for values in fresh.values())
            sizes = {slot.layer: slot.weight.shape[1] * slot.groups for slot in slots}
            merged = {name: torch.full((size,), best, dtype=torch.float64) for name, size in sizes.items()}
        else:
            merged = {name: values.clone() for name, values in self.kept.items()}
        for slot in slots:
            if slot.layer in fresh:
                merged[slot.layer][slot.channels.cpu()] = fresh[slot.layer]
        return merged
