"""Frozen modules that are affine in their input, as every convolution is: they keep nothing of it.

The gradient of such a module does not depend on where it is taken, so the backward runs the module again, on zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trady_triton.nn.graph import builds_graph
from trady_triton.nn.made import made


class _Affine(torch.autograd.Function):
    """y = run(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        device = x.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.run, ctx.options = run, {"dtype": x.dtype, "device": x.device}
        ctx.shape, ctx.strides = x.shape, x.stride()
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Without this forward its derivative would have to be recorded in the first one: that graph keeps weights which
        # are made on the way, standardised or cast, and nothing tells those from what is made of x.
        x = torch.empty_strided(ctx.shape, ctx.strides, **ctx.options).zero_().requires_grad_()
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            y = ctx.run(x.view_as(x))  # no leaf: hooks that meters put on a module's inputs refuse those
        return *torch.autograd.grad(y, x, dy), None


@cache
def affine(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module type, affine in its input, that keeps nothing while frozen and called on that alone."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = partial(kind.forward, self)
        if kwargs or len(args) != 1:  # as an output_size
            return run(*args, **kwargs)
        (x,) = args
        is_frozen = not any(parameter.requires_grad for parameter in self.parameters())
        return _Affine.apply(x, run) if is_frozen and builds_graph(x) else run(x)

    return made("Lean", kind, forward, affine, kind)
