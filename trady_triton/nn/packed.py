"""Modules that keep their input in one byte an element and run again on what it decodes to, in the backward.

Fit for a module whose samples do not see each other and that would keep its input anyway: the code errs by half a step
of 1/255 of the range of a row, a row being what the input's dimensions `dims` span.
Kept: the code [N, ...] uint8, and of each row its lowest value and the step of its code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trady_triton.nn.parts import parts
from trady_triton.policy import Policy

Run = Callable[..., Tensor]


class _PackedInput(torch.autograd.Function):
    """y = run(x, *parameters)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Run, dims: tuple[int, ...], *parameters: Tensor | None) -> Tensor:
        ctx.save_for_backward(*encode(x, dims), *parameters)
        ctx.run, ctx.dtype = run, x.dtype
        device = x.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return run(x, *parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        code, low, step, *parameters = ctx.saved_tensors
        leaves = [None if p is None else p.detach().requires_grad_(p.requires_grad) for p in parameters]
        trained = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        dx = torch.empty_like(code, dtype=ctx.dtype) if ctx.needs_input_grad[0] else None
        sums = [torch.zeros_like(leaf) for leaf in trained]
        for number, (dy_part, *packed) in enumerate(parts(dy, code, low, step)):
            x = decode(*packed).to(ctx.dtype).requires_grad_(dx is not None)
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                y = ctx.run(x, *leaves)
            wanted = trained if dx is None else [*trained, x]
            grads = torch.autograd.grad(y, wanted, dy_part)
            for total, grad in zip(sums, grads, strict=False):
                total += grad
            if dx is not None:
                dx.chunk(8)[number].copy_(grads[-1])
        found = iter(sums)
        return dx, None, None, *(next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves)


def packed_call(run: Run, x: Tensor, dims: tuple[int, ...], policy: Policy, *parameters: Tensor | None) -> Tensor:
    """run(x, *parameters), keeping x [N, ...] exactly or packed, as the policy allows; `dims` exclude dimension 0."""
    tensors = (x, *(parameter for parameter in parameters if parameter is not None))
    if policy.is_exact or not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return run(x, *parameters)
    y: Tensor = _PackedInput.apply(x, run, dims, *parameters)
    return y


def planes(x: Tensor) -> tuple[int, ...]:
    """The dimensions of a plane of x [N, C, *S], or of a sample of x [N, C]."""
    return tuple(range(2, x.dim())) or (1,)


def encode(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The code of x [N, ...] as uint8, and its rows' lowest values and steps, with dimensions of size 1 at `dims`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    code = torch.empty_like(x, dtype=torch.uint8)
    rows = [1 if dim in dims or dim - x.dim() in dims else size for dim, size in enumerate(x.shape)]
    low, step = (torch.empty(rows, dtype=wide, device=x.device) for _ in range(2))
    for x_part, *outs in parts(x, code, low, step):
        _encode(x_part.to(wide), dims, *outs)
    return code, low, step


def decode(code: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """What a code stands for."""
    return code.to(low.dtype).mul_(step).add_(low)


def _encode(x: Tensor, dims: tuple[int, ...], code: Tensor, low: Tensor, step: Tensor) -> None:
    low.copy_(x.amin(dims, keepdim=True))
    span = x.amax(dims, keepdim=True).sub_(low).clamp_(min=torch.finfo(x.dtype).tiny)
    step.copy_(span / 255)
    code.copy_((x - low).div_(step).add_(0.5).clamp_(max=255))
