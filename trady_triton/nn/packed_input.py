"""Modules that keep their input in one byte an element and run again on what it decodes to, in the backward.

Fit for a module whose samples do not see each other and that would keep its input anyway: the code errs by half a step
of 1/255 of the range of a row, a row being what the input's dimensions `dims` span.
Kept: the code [N, ...] uint8, and of each row its lowest value and the step of its code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.dropout import _DropoutNd

from trady_triton.nn.made import made
from trady_triton.nn.parts import can_part, parts
from trady_triton.policy import Policy
from trady_triton.slot import Draw, Ticket

Run = Callable[[Tensor], Tensor]
Dims = tuple[int, ...]


class _PackedInput(torch.autograd.Function):
    """y = run(x), where run uses the `trained` tensors as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Run, dims: Dims, draws: Sequence[Draw], *trained: Tensor) -> Tensor:
        ctx.save_for_backward(*encode(x, dims), *trained)
        ctx.tickets = [Ticket(draw) for draw in draws]
        ctx.run, ctx.dtype = run, x.dtype
        device = x.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        code, low, step, *trained = ctx.saved_tensors
        for ticket in ctx.tickets:
            ticket.redeem()
        dx = torch.empty_like(code, dtype=ctx.dtype) if ctx.needs_input_grad[0] else None
        sums = [torch.zeros_like(tensor, dtype=_wide(tensor)) for tensor in trained]
        outs = [] if dx is None else [dx]
        for dy_part, code_part, low_part, step_part, *out in parts(dy, code, low, step, *outs):
            x = decode(code_part, low_part, step_part).to(ctx.dtype).requires_grad_(dx is not None)
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                y = ctx.run(x.view_as(x))  # no leaf: hooks that meters put on a module's inputs refuse those
            wanted = trained if dx is None else [*trained, x]
            # Compiled code takes every slot for drawn: the proxies of those that are not take no part.
            grads = torch.autograd.grad(y, wanted, dy_part, materialize_grads=True)
            for total, grad in zip(sums, grads, strict=False):
                total += grad
            for dx_part in out:
                dx_part.copy_(grads[-1])
        return dx, None, None, None, *(total.to(tensor.dtype) for total, tensor in zip(sums, trained, strict=True))


def packed_call(
    run: Run, x: Tensor, dims: Dims, policy: Policy, *trained: Tensor | None, draws: Sequence[Draw] = ()
) -> Tensor:
    """run(x), keeping x [N, ...] exactly or packed, as the policy allows; `dims` exclude dimension 0.

    `trained` are the tensors that run uses as well, the proxies of `draws` aside; of all those that require a gradient
    get one.
    """
    trained = *trained, *(draw.proxy for draw in draws)
    wanted = [tensor for tensor in trained if tensor is not None and tensor.requires_grad]
    records = torch.is_grad_enabled() and (x.requires_grad or wanted)
    if policy.is_exact or not records or not _is_smaller(x, dims):
        return run(x)
    y: Tensor = _PackedInput.apply(x, run, dims, draws, *wanted)
    return y


@cache
def packed(kind: type[nn.Module], rows: Callable[[nn.Module, Tensor], Dims] | None = None) -> type[nn.Module]:
    """The subclass of a module type of one input [N, ...] that may keep one byte an element. One class for a type.

    `rows(module, x)` are the dimensions that a row of the code spans, by default those of a plane.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = partial(kind.forward, self)
        policy: Policy = self.policy  # type: ignore[assignment]
        is_alone = len(args) == 1 and not kwargs
        if not is_alone or policy.is_exact or getattr(self, "inplace", False) or not _runs_alike(self, policy):
            return run(*args, **kwargs)
        (x,) = args
        return packed_call(run, x, rows(self, x) if rows else planes(x), policy, *self.parameters(), draws=_draws(self))

    return made("Packed", kind, forward, packed, kind, *([rows] if rows else []))


def _is_smaller(x: Tensor, dims: Dims) -> bool:
    """Whether the code of x takes fewer bytes than x; a row must lie within a sample."""
    rows = x.numel() // max(1, prod(x.shape[dim] for dim in dims)) if len(dims) < x.dim() else x.numel()
    return x.numel() + 2 * _wide(x).itemsize * rows < x.numel() * x.itemsize


def _draws(module: nn.Module) -> list[Draw]:
    """What is drawn within a module."""
    slots = {id(slot): slot for child in module.modules() if (slot := getattr(child, "slot", None)) is not None}
    return [slot.draw for slot in slots.values() if slot.is_drawn]


def _runs_alike(module: nn.Module, policy: Policy) -> bool:
    """Whether a second run on parts of the batch gives the same: nothing is random or of the whole batch."""
    is_random = any(child.training and isinstance(child, _DropoutNd) for child in module.modules())
    return not is_random and can_part(module, policy)


def planes(x: Tensor) -> Dims:
    """The dimensions of a plane of x [N, C, *S], or of a sample of x [N, C]."""
    return tuple(range(2, x.dim())) or (1,)


def normalized(module: nn.Module, x: Tensor) -> Dims:
    """The dimensions over which a LayerNorm or RMSNorm goes: the last ones."""
    return tuple(range(-len(module.normalized_shape), 0))  # type: ignore[arg-type]


def encode(x: Tensor, dims: Dims) -> tuple[Tensor, Tensor, Tensor]:
    """The code of x [N, ...] as uint8, and its rows' lowest values and steps, with dimensions of size 1 at `dims`."""
    wide = _wide(x)
    code = torch.empty_like(x, dtype=torch.uint8)
    rows = [1 if dim in dims or dim - x.dim() in dims else size for dim, size in enumerate(x.shape)]
    low, step = (torch.empty(rows, dtype=wide, device=x.device) for _ in range(2))
    for x_part, *outs in parts(x, code, low, step):
        _encode(x_part.to(wide), dims, *outs)
    return code, low, step


def decode(code: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """What a code stands for."""
    return code.to(low.dtype).mul_(step).add_(low)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _encode(x: Tensor, dims: Dims, code: Tensor, low: Tensor, step: Tensor) -> None:
    low.copy_(x.amin(dims, keepdim=True))
    span = x.amax(dims, keepdim=True).sub_(low).clamp_(min=torch.finfo(x.dtype).tiny)
    step.copy_(span / 255)
    code.copy_((x - low).div_(step).add_(0.5).clamp_(max=255))
