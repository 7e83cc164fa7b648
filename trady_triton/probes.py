"""Passes over data that measure channels for a draw: what oracles and per-task methods need beyond training itself.

Each runs a planned model as it stands, with its own lean layers, and leaves weights, gradients and draws as they were.
Their cost is not in a plan's budget: `gradient_scores` holds the gradient and the input of every channel at once.
Shapes: N batch, C input channels, O output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trady_triton.sampling import Scores
from trady_triton.slot import ChannelSlot, find_slot

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def gradient_scores(model: nn.Module, batches: Batches, loss_fn: Loss) -> Scores:
    """Norm of the gradient over all batches, weights untouched, of every channel of the pool: layer -> [C].

    Each batch counts alike, by its mean loss.

    Raises:
        ValueError: no batches, or a model without a plan.
        RuntimeError: gradients wait for step().
    """
    slots = _slots(model)
    with _every_channel(model, slots):
        for x, y in _some(batches):
            loss_fn(model(x), y).backward()  # type: ignore[no-untyped-call]
        return {slot.layer: slot.gradient().flatten(1).norm(dim=1).double().cpu() for slot in slots}


def fisher_scores(model: nn.Module, batches: Batches, loss_fn: Loss) -> Scores:
    """TinyTrain's Delta_c = 1/(2N) sum_n (sum_d a_nd g_nd)^2 of every input channel of the pool: layer -> [C].

    a is the channel's input, g the gradient of the sample's own loss with respect to it; the loss must be a mean over
    the samples. Where windows are folded into the batch each counts as a sample.
    """
    slots = _slots(model)
    sums = {slot.layer: torch.zeros(slot.weight.shape[1] * slot.groups, dtype=torch.float64) for slot in slots}
    count = 0

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, layer, samples = args[0], _layer(module), size

        def add(grad: Tensor) -> None:
            product = (x.detach() * grad * samples).double()
            by_channel = _positions_last(module, product).sum(2)
            sums[layer] += by_channel.square().sum(0).cpu()

        x.register_hook(add)  # type: ignore[no-untyped-call]

    with _every_channel(model, slots), ExitStack() as exits:
        for module in model.modules():
            if isinstance(getattr(module, "slot", None), ChannelSlot):
                exits.callback(module.register_forward_pre_hook(watch).remove)
        for x, y in _some(batches):
            size = len(y)
            count += size
            loss_fn(model(x.detach().clone().requires_grad_()), y).backward()  # type: ignore[no-untyped-call]
    return {layer: total / (2 * count) for layer, total in sums.items()}


class NeuronVelocity:
    """How fast the response of every output neuron to held-out data changes from epoch to epoch (NEq, Velocity).

    phi is the mean over samples of the cosine similarity between the neuron's output map now and an epoch ago, and
    v = mu * v_before + dphi - dphi_before, as the published code has it (its paper writes v = dphi - mu * v_before).
    Keeps the output maps of the last epoch, on the CPU.
    """

    def __init__(self, model: nn.Module, mu: float = 0.5) -> None:
        self.model, self.mu = model, mu
        self._maps: dict[str, Tensor] = {}
        self._delta: dict[str, Tensor] = {}
        self._state: dict[str, Tensor] = {}

    def update(self, batches: Batches) -> Scores | None:
        """v of every neuron of the pool, layer -> [O]; None the first time, when there is nothing to compare with."""
        maps, before = self._responses(batches), self._maps
        self._maps = maps
        if not before:
            zero = {layer: torch.zeros(outputs.shape[1], dtype=torch.float64) for layer, outputs in maps.items()}
            self._delta, self._state = zero, dict(zero)
            return None
        velocity = {}
        for layer, now in maps.items():
            delta = (1 - F.cosine_similarity(now, before[layer], dim=2).double()).mean(0)
            change = self._delta[layer] - delta
            velocity[layer] = self._state[layer] + change
            self._state[layer] = self.mu * velocity[layer] - change
            self._delta[layer] = delta
        return velocity

    @torch.no_grad()
    def _responses(self, batches: Batches) -> dict[str, Tensor]:
        """Outputs of every layer of the pool: [N, O, positions]."""
        found: dict[str, list[Tensor]] = {}

        def keep(module: nn.Module, args: Any, y: Tensor) -> None:
            flat = _positions_last(module, y).float().cpu().clone()  # an activation in place may change y
            found.setdefault(_layer(module), []).append(flat)

        with ExitStack() as exits:
            for module in self.model.modules():
                if isinstance(getattr(module, "slot", None), ChannelSlot):
                    exits.callback(module.register_forward_hook(keep).remove)
            for x, _ in _some(batches):
                self.model(x)
        return {layer: torch.cat(parts) for layer, parts in found.items()}


def _slots(model: nn.Module) -> list[ChannelSlot]:
    slots = [slot for parameter in model.parameters() if (slot := find_slot(parameter)) is not None]
    if not slots:
        raise ValueError("the model has no plan: call apply_plan(model, plan) first")
    return slots


def _layer(module: nn.Module) -> str:
    slot = module.slot
    assert isinstance(slot, ChannelSlot)
    return slot.layer


def _positions_last(module: nn.Module, tensor: Tensor) -> Tensor:
    """Input or output of a layer as [N, channels, positions]."""
    if isinstance(module, nn.Linear):
        return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1]).mT
    return tensor.flatten(2)


def _some(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise ValueError("batches is empty: wanted at least one (input, target)")


@contextmanager
def _every_channel(model: nn.Module, slots: list[ChannelSlot]) -> Iterator[None]:
    """Every channel of every slot drawn; draws, gradients and random state come back at the end.

    Raises:
        RuntimeError: gradients wait for step(), and optimizers would take these backwards for theirs.
    """
    for slot in slots:
        if slot.is_pending:
            raise RuntimeError(f"layer {slot.layer!r}: gradients wait for step(); measure before the backward")
    grads = {parameter: parameter.grad for parameter in model.parameters()}
    devices = {slot.weight.device.index or 0 for slot in slots if slot.weight.is_cuda}
    with ExitStack() as exits, torch.random.fork_rng(sorted(devices)), torch.enable_grad():
        for slot in slots:
            exits.enter_context(slot.borrowed(range(slot.weight.shape[1] * slot.groups)))
        try:
            for parameter in grads:
                parameter.grad = None
            yield
        finally:
            for parameter, grad in grads.items():
                parameter.grad = grad
