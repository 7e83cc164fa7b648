"""ChannelSlot: which input channels of one weight are trained now, and the leaf where their gradient arrives.

Shapes: C input channels, O output channels, G groups, K drawn channels; conv weight [O, C/G, R, S], Linear [O, C].
The compact gradient is channel-major for every layer, [K, O/G, R, S] or [K, O]: row i is dW of channel `channels[i]`.

`.grad` of a weight must have the weight's shape, so the compact gradient needs a leaf of its own. The proxy is such a
leaf with the storage of a single element: it is passed to the autograd Function, which returns the gradient for it.
Hooks, accumulation, clipping and GradScaler see an ordinary small parameter; no state_dict knows it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trady_triton.ops.upload import upload
from trady_triton.sharding import drawn_rows, is_sharded

_ATTRIBUTE = "trady_slot"
_LOST = "this backward belongs to a forward before the last resample(): its gradient is lost"


class Ticket:
    """A forward that kept channels of a draw and waits for its backward."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        draw.waiting.add(self)

    def redeem(self) -> None:
        """The backward ran.

        Raises:
            RuntimeError: the channels were drawn anew since the forward, so the gradient would be lost.
        """
        if self.draw.replaced:
            raise RuntimeError(_LOST)
        self.draw.waiting.discard(self)


class Draw:
    """One draw of one slot: `channels` [K] int64, ascending, and the proxy of the compact gradient.

    `is_first` marks the empty one that a slot starts with. `unapplied` tells whether a backward has added to the
    proxy's gradient since the last optimizer step, `applied` is the gradient of that step and its version after one
    more change, `averaged` tells whether the gradient is the mean over the processes that train together. `factor`,
    [K, 1] or [K, O/G], multiplies the gradient in the update; None leaves it as it is. Where the store is quantised,
    `bits` is 8 or 4 and `noise`, [1] int64, the seed of its rounding.
    """

    def __init__(self, channels: Tensor, proxy: Tensor, bits: int = 0, noise: Tensor | None = None) -> None:
        self.channels = channels
        self.proxy = proxy
        self.bits = bits
        self.noise = noise
        self.is_first = False
        self.factor: Tensor | None = None
        self.replaced = False
        self.unapplied = False
        self.applied: tuple[weakref.ref[Tensor], int] | None = None
        self.averaged = False
        # By a weak reference: a cycle would keep replaced gradients until the garbage collector runs.
        proxy.register_post_accumulate_grad_hook(partial(_note_gradient, weakref.ref(self)))  # type: ignore[no-untyped-call]
        # One compilation serves every number of channels; the hint makes it keep the compact store, not all of x.
        for tensor in (channels, proxy):
            torch._dynamo.decorators.mark_unbacked(tensor, 0, hint_override=1)
        self.waiting: weakref.WeakSet[Ticket] = weakref.WeakSet()


def _note_gradient(reference: weakref.ref[Draw], proxy: Tensor) -> None:
    draw = reference()
    if draw is None or draw.replaced:
        raise RuntimeError(_LOST)
    if proxy.numel() == 0:
        proxy.grad = None  # compiled code runs the backward of every layer of the pool, drawn or not
        return
    grad = proxy.grad
    if draw.applied is not None and grad is draw.applied[0]() and grad is not None and grad._version == draw.applied[1]:
        warnings.warn(
            "this backward adds to gradients that the last step has used: model.zero_grad() does not see those of the "
            "drawn channels; call optimizer.zero_grad() (where they were zeroed through .data, nothing is wrong)",
            stacklevel=5,
        )
    draw.unapplied, draw.applied, draw.averaged = True, None, False


class ChannelSlot:
    """The channels and the proxy of one weight. Starts with no channel drawn."""

    def __init__(self, layer: str, weight: nn.Parameter, groups: int, plan: str, bits: int = 0) -> None:
        """`layer` names the weight in errors, `plan` is the fingerprint of the plan that it belongs to.

        `bits` is 8 or 4 where the compact store is quantised.
        """
        self.layer = layer
        self.weight = weight
        self.groups = groups
        self.plan = plan
        self.bits = bits
        self.step = 0
        self.draw = self._make_draw(())
        self.draw.is_first = True

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep the channels; proxy, gradients and waiting forwards belong to this slot alone."""
        return {**self.__dict__, "draw": self.draw.channels.tolist()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        channels = state.pop("draw")
        self.__dict__.update(state)
        self.draw = self._make_draw(channels)

    @property
    def channels(self) -> Tensor:
        """Ids of the drawn input channels, [K] int64, ascending."""
        return self.draw.channels

    @property
    def proxy(self) -> Tensor:
        """The leaf [K, O/G, *kernel_size] whose `.grad` is the compact weight gradient."""
        return self.draw.proxy

    @property
    def is_drawn(self) -> bool:
        """Whether channels are drawn; compiled code, which serves all draws, takes every slot for drawn."""
        return torch.compiler.is_compiling() or self.channels.numel() > 0

    @property
    def is_waiting(self) -> bool:
        """Whether a forward has kept channels of this draw and its backward has not run."""
        return len(self.draw.waiting) > 0

    @property
    def is_pending(self) -> bool:
        """Whether the proxy holds a gradient that no optimizer step has applied."""
        return self.draw.unapplied and self.proxy.grad is not None

    def settle(self) -> None:
        """An optimizer step has applied the gradient, or left it out."""
        grad = self.proxy.grad
        self.draw.unapplied = False
        self.draw.applied = None if grad is None else (weakref.ref(grad), grad._version + 1)

    @property
    def is_stale(self) -> bool:
        """Whether the weight changed device or dtype after the draw."""
        return self.proxy.device != self.weight.device or self.proxy.dtype != self.weight.dtype

    def set(
        self, channels: Sequence[int], scale: Sequence[float] | None = None, outputs: Sequence[int] | None = None
    ) -> None:
        """Install a draw: channel ids in [0, C), ascending.

        `scale` holds a factor for the update of each channel; where `outputs` is given, only those output channels
        are updated.
        """
        draw = self._make_draw(channels)
        draw.factor = self._factor(draw.channels, scale, outputs)
        self.draw.replaced = True
        self.draw = draw

    def seed_step(self, step: int) -> None:
        """Round the stores of the coming forwards by the noise of optimizer step `step`.

        The noise is a function of plan, layer and step, so a forward that is run again within a step repeats its store.
        """
        self.step = step
        if self.draw.noise is not None:
            self.draw.noise.fill_(self._seed())

    @contextmanager
    def borrowed(self, channels: Sequence[int]) -> Iterator[None]:
        """Other channels inside the block; the draw of before comes back untouched."""
        own = self.draw
        self.draw = self._make_draw(channels)
        try:
            yield
        finally:
            self.draw = own

    def gather(self) -> Tensor:
        """Copy of the drawn part of the weight, [K, O/G, *kernel_size]; of a sharded one zero where others own it."""
        if is_sharded(self.weight):
            local, there, here = drawn_rows(self.weight.detach(), self.channels, self.groups)
            values = local.new_zeros(self.proxy.shape)
            values[here] = local[there]
            return values
        view, index = self._grouped_view()
        return view[index]

    def scatter_(self, values: Tensor) -> None:
        """Write [K, O/G, *kernel_size] into the drawn part of the weight, of a sharded one into what is owned here.

        The rest is not touched.
        """
        if is_sharded(self.weight):
            local, there, here = drawn_rows(self.weight.detach(), self.channels, self.groups)
            local[there] = values[here]
            return
        view, index = self._grouped_view()
        view[index] = values

    def _grouped_view(self) -> tuple[Tensor, tuple[Tensor, slice, Tensor]]:
        """W as [G, O/G, C/G, ...] and the index that picks the drawn channels from it."""
        weight = self.weight.detach()
        view = weight.view(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        group_size = view.shape[2]
        return view, (self.channels // group_size, slice(None), self.channels % group_size)

    def gradient(self) -> Tensor:
        """The compact gradient that arrived, times the draw's factor, contiguous."""
        grad, factor = self.proxy.grad, self.draw.factor
        assert grad is not None
        if factor is not None:
            grad = grad * factor.view(*factor.shape, *[1] * (grad.dim() - 2)).to(grad.dtype)
        return grad.contiguous()

    def _factor(self, channels: Tensor, scale: Sequence[float] | None, outputs: Sequence[int] | None) -> Tensor | None:
        """[K, 1] from a scale of the channels, [K, O/G] where outputs are chosen, None where there is neither."""
        if scale is None and outputs is None:
            return None
        device = self.weight.device
        factor = torch.ones(len(channels), 1, device=device)
        if scale is not None:
            factor = upload(scale, torch.float32, device).view(-1, 1)
        if outputs is not None:
            chosen = torch.zeros(self.weight.shape[0], device=device)
            chosen[upload(outputs, torch.int64, device)] = 1.0
            group_of = channels // self.weight.shape[1]
            factor = factor * chosen.view(self.groups, -1)[group_of]
        return factor

    def _make_draw(self, channels: Sequence[int]) -> Draw:
        weight = self.weight
        in_channels = weight.shape[1] * self.groups
        ids = list(channels)
        if ids != sorted(set(ids)) or (ids and not 0 <= ids[0] <= ids[-1] < in_channels):
            raise ValueError(f"layer {self.layer!r}: channels {ids}, wanted ascending ids in [0, {in_channels})")
        shape = (len(ids), weight.shape[0] // self.groups, *weight.shape[2:])
        proxy = torch.zeros((), dtype=weight.dtype, device=weight.device).expand(shape).requires_grad_()
        noise = torch.full((1,), self._seed(), device=weight.device) if self.bits else None
        return Draw(upload(ids, torch.int64, weight.device), proxy, self.bits, noise)

    def _seed(self) -> int:
        return int.from_bytes(sha256(f"{self.plan} {self.layer} {self.step}".encode()).digest()[:7], "little")


@dataclass(frozen=True)
class Pool:
    """A planned model, the slots of its weights, and the plan: what an optimizer needs to know."""

    plan: Any  # a Plan; slots know none
    slots: tuple[ChannelSlot, ...]
    model: weakref.ref[nn.Module]


@dataclass(frozen=True)
class _Link:
    """What a parameter carries of a planned model. Pickles as an empty link: a loaded parameter belongs to none."""

    slot: ChannelSlot | None = None
    pool: Pool | None = None
    hook: RemovableHandle | None = None

    def __reduce__(self) -> tuple[type[_Link], tuple[()]]:
        return _Link, ()


def attach_pool(pool: Pool, whole: Iterable[Tensor]) -> None:
    """Make the pool reachable from its weights and from `whole`, the parameters that are trained whole.

    So an optimizer that is given parameters finds it, also one that gets only those with `requires_grad`. The link
    survives `.to()` and `load_state_dict`, but neither a deepcopy nor a pickle: a copied model has no slots to train
    until a plan is applied to it.
    """
    for parameter in whole:
        hook = parameter.register_post_accumulate_grad_hook(partial(_tell_if_undrawn, pool))  # type: ignore[no-untyped-call]
        setattr(parameter, _ATTRIBUTE, _Link(None, pool, hook))
    for slot in pool.slots:
        setattr(slot.weight, _ATTRIBUTE, _Link(slot, pool))


def _tell_if_undrawn(pool: Pool, parameter: Tensor) -> None:
    """Another optimizer would train what has a gradient, the head, and say nothing. A plan without budget may be so."""
    if pool.plan.strategy.has_budget and all(slot.draw.is_first for slot in pool.slots):
        warnings.warn(
            "backward through a planned model of which no channels were ever drawn: only what is trained whole, the "
            "head, has gradients; make a TraDyOptimizer and call its resample(epoch), or else remove_plan(model)",
            stacklevel=5,
        )


def find_slot(weight: Tensor) -> ChannelSlot | None:
    """The slot of a weight, or None."""
    link = getattr(weight, _ATTRIBUTE, None)
    return link.slot if isinstance(link, _Link) else None


def find_pool(parameter: Tensor) -> Pool | None:
    """The pool of the planned model that trains this parameter, or None."""
    link = getattr(parameter, _ATTRIBUTE, None)
    return link.pool if isinstance(link, _Link) else None


def detach_pool(parameter: Tensor) -> None:
    """Forget pool and slot of a parameter."""
    if isinstance(link := getattr(parameter, _ATTRIBUTE, None), _Link):
        if link.hook is not None:
            link.hook.remove()
        delattr(parameter, _ATTRIBUTE)
