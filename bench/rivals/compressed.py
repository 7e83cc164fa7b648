"""The pool trained dense on compressed inputs: what a layer keeps for dW is int8, or a low-rank tensor (ASI, HOSVD)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trady_triton.bench.rivals import partial
from trady_triton.bench.rivals.tucker import Tucker
from trady_triton.bench.training import Setup, Training


class Int8:
    """Stores x as 8-bit codes with a scale a sample."""

    def __init__(self, setup: Setup, layer: str) -> None:
        pass

    def compress(self, x: Tensor) -> tuple[Tensor, ...]:
        """(codes, scales)."""
        scale = x.abs().amax(tuple(range(1, x.dim())), keepdim=True).clamp_min(1e-30) / 127
        return torch.round(x / scale).to(torch.int8), scale

    def wgrad(self, kept: tuple[Tensor, ...], dy: Tensor, layer: nn.Module) -> Tensor:
        """dW of the decompressed input."""
        return weight_gradient(kept[0].to(kept[1].dtype) * kept[1], dy, layer)


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Any, store: Any) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # there is no QR in half precision
            ctx.save_for_backward(weight, *store.compress(x))
        ctx.layer, ctx.store, ctx.x_shape = layer, store, x.shape
        return _forward(x, weight, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        weight = weight.to(dy.dtype)
        dx = input_gradient(ctx.x_shape, weight, dy, ctx.layer) if ctx.needs_input_grad[0] else None
        return dx, ctx.store.wgrad(tuple(kept), dy, ctx.layer), None, None


def int8(model: nn.Module, setup: Setup) -> Training:
    """Inputs of the pool in 8 bits."""
    return _with_store(model, setup, Int8)


def asi(model: nn.Module, setup: Setup) -> Training:
    """Inputs of the pool as Tucker tensors found by one step of subspace iteration (ASI, ICML 2025)."""
    return _with_store(model, setup, Tucker)


def _with_store(model: nn.Module, setup: Setup, kind: Any) -> Training:
    for name in setup.pool:
        layer: Any = model.get_submodule(name)
        if type(layer) in (nn.Conv2d, nn.Linear):  # others, such as timm's Conv2dSame, pad in their own way: left dense
            layer.forward = _patched(layer, kind(setup, name))
    return partial.pool_dense(model, setup)


def _patched(layer: Any, store: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        y: Tensor = _Compressed.apply(x, layer.weight, layer, store)
        shape = (-1,) + (1,) * (y.dim() - 2) if isinstance(layer, nn.Conv2d) else (-1,)
        return y if layer.bias is None else y + layer.bias.view(shape)

    return forward


def _forward(x: Tensor, weight: Tensor, layer: Any) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def input_gradient(x_shape: torch.Size, weight: Tensor, dy: Tensor, layer: Any) -> Tensor:
    """dX."""
    if isinstance(layer, nn.Linear):
        return dy @ weight
    return torch.nn.grad.conv2d_input(x_shape, weight, dy, layer.stride, layer.padding, layer.dilation, layer.groups)


def weight_gradient(x: Tensor, dy: Tensor, layer: Any) -> Tensor:
    """Dense dW."""
    x = x.to(dy.dtype)
    if isinstance(layer, nn.Linear):
        return dy.flatten(0, -2).T @ x.flatten(0, -2)
    shape = (dy.shape[1], x.shape[1] // layer.groups, *layer.kernel_size)
    return torch.nn.grad.conv2d_weight(x, shape, dy, layer.stride, layer.padding, layer.dilation, layer.groups)
