"""Convolution and Linear that keep for the backward only what the drawn channels need.

Shapes: N batch, C input channels, K drawn channels, O output channels, G groups, R x S kernel, T tokens.
Forward keeps x[:, channels] (a compact copy) if channels are drawn, and a reference to W if x needs a gradient.
Backward computes dX where somebody needs it and the compact dW of the drawn channels (eq. 2), channel-major.
The store and the compact dW are ops of `trady_triton.ops`: Triton kernels on a GPU, their torch twins elsewhere.
A kept store is (the channels, None, None), or (codes, scale, zero) where the plan quantises it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trady_triton.cost import keeps_strided_pixels
from trady_triton.ops import (
    conv_wgrad,
    dequantize_channels,
    grouped_wgrad,
    quantize_channels,
    store_channels,
    token_wgrad,
)
from trady_triton.slot import ChannelSlot, Draw, Ticket

Kept = tuple[Tensor | None, Tensor | None, Tensor | None]


class ConvGeometry(NamedTuple):
    """Everything of a convolution but its tensors. `overhang` is zero padding (left, right, top, bottom), added
    before `padding`: what timm's and TensorFlow's "same" padding needs where the two sides differ."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    overhang: tuple[int, int, int, int] = (0, 0, 0, 0)


def lean_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: ChannelSlot | None, geometry: ConvGeometry
) -> Tensor:
    """Like `F.conv2d`, training only the slot's channels: x [N, C, H, W] or [C, H, W], weight [O, C/G, R, S].

    Raises:
        RuntimeError: the weight itself requires a gradient, or was moved since the draw.
    """
    if x.dim() == 3:
        return lean_conv2d(x.unsqueeze(0), weight, bias, slot, geometry).squeeze(0)
    draw = _current_draw(weight, slot)
    y: Tensor = _LeanConv2d.apply(x, weight, bias, draw.proxy if draw else None, draw, geometry)
    return y


def lean_linear(x: Tensor, weight: Tensor, bias: Tensor | None, slot: ChannelSlot | None) -> Tensor:
    """Like `F.linear`, training only the slot's input features: x [..., C], weight [O, C] -> [..., O].

    Raises:
        RuntimeError: the weight itself requires a gradient, or was moved since the draw.
    """
    draw = _current_draw(weight, slot)
    y: Tensor = _LeanLinear.apply(x, weight, bias, draw.proxy if draw else None, draw)
    return y


def _current_draw(weight: Tensor, slot: ChannelSlot | None) -> Draw | None:
    if weight.requires_grad:
        raise RuntimeError(
            "the weight of a lean layer requires a gradient, which nothing would compute: leave requires_grad as "
            "apply_plan set it, or call remove_plan(model) first"
        )
    if slot is None or not slot.is_drawn or not torch.is_grad_enabled():
        return None
    if slot.is_stale:
        raise RuntimeError(
            f"layer {slot.layer!r}: the weight is {weight.dtype} on {weight.device}, its channels were drawn for "
            f"{slot.proxy.dtype} on {slot.proxy.device}; call optimizer.resample(epoch)"
        )
    if torch.compiler.is_compiling():  # where sizes are symbols, and unrelated until it is said that they are equal
        torch._check(slot.channels.shape[0] == slot.proxy.shape[0])
    return slot.draw


class _LeanConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        proxy: Tensor | None,
        draw: Draw | None,
        geometry: ConvGeometry,
    ) -> Tensor:
        y, seen = _conv_fprop(x, weight, bias, geometry)
        store: Kept = None, None, None
        if ctx.needs_input_grad[3] and draw is not None:
            store = _conv_store(seen, draw, weight.shape, geometry)
            ctx.ticket = _ticket(draw)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *store)
        ctx.geometry, ctx.draw, ctx.x_shape, ctx.weight_shape = geometry, draw, x.shape, weight.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *store = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _conv_dgrad(dy, weight.to(dy.dtype), ctx.x_shape, ctx.geometry)
        if ctx.needs_input_grad[2]:
            db = dy.sum((0, 2, 3))
        if ctx.needs_input_grad[3]:
            _redeem(ctx.ticket)
            dw = _conv_wgrad(dy, store, ctx.draw, ctx.x_shape, ctx.weight_shape, ctx.geometry)
        return dx, None, db, dw, None, None


class _LeanLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, proxy: Tensor | None, draw: Draw | None
    ) -> Tensor:
        x, w, b = _as_autocast(x, weight, bias)
        store: Kept = None, None, None
        if ctx.needs_input_grad[3] and draw is not None:
            store = _keep(x, draw, "tokens")
            ctx.ticket = _ticket(draw)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *store)
        ctx.draw = draw
        return F.linear(x, w, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *store = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(dy.dtype)
        if ctx.needs_input_grad[2]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0)
        if ctx.needs_input_grad[3]:
            _redeem(ctx.ticket)
            dw = _token_wgrad(store, dy, -1, ctx.draw)
        return dx, None, db, dw, None


def _as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands as torch.autocast would cast them, so that the store holds what the product saw."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _conv_fprop(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> tuple[Tensor, Tensor]:
    """The output, and x as the product saw it, before the overhang."""
    seen, w, b = _as_autocast(x, weight, bias)
    stride, padding, dilation, groups, overhang = geometry
    padded = F.pad(seen, overhang) if any(overhang) else seen
    return F.conv2d(padded, w, b, stride, padding, dilation, groups), seen


def _keep(x: Tensor, draw: Draw, layout: str) -> Kept:
    """The drawn channels of x in a layout of `ops.store`, quantised where the plan says so."""
    if draw.bits:
        return quantize_channels(x, draw.channels, layout, draw.bits, seed=draw.noise)
    return store_channels(x, draw.channels, layout), None, None


def _conv_store(x: Tensor, draw: Draw, weight_shape: torch.Size, geometry: ConvGeometry) -> Kept:
    """The compact store [K, N, H, W]; of a 1x1 convolution [K, N P Q], only the pixels that its stride keeps."""
    if _skips_pixels(weight_shape, geometry):
        x = x[:, :, :: geometry.stride[0], :: geometry.stride[1]]
    return _keep(x, draw, "pixels" if _is_product(weight_shape, geometry) else "planes")


def _skips_pixels(weight_shape: torch.Size, geometry: ConvGeometry) -> bool:
    return keeps_strided_pixels(tuple(weight_shape[2:]), geometry.padding) and not any(geometry.overhang)


def _is_product(weight_shape: torch.Size, geometry: ConvGeometry) -> bool:
    """Whether the convolution is a matrix product over pixels."""
    return geometry.groups == 1 and _skips_pixels(weight_shape, geometry)


def _token_wgrad(kept: Sequence[Tensor], dy: Tensor, channel_dim: int, draw: Draw) -> Tensor:
    """The compact dW [K, O] of a matrix product."""
    store, scale, zero = kept
    return token_wgrad(store, dy, channel_dim, scale=scale, zero=zero, bits=draw.bits, out_dtype=draw.proxy.dtype)


def _conv_wgrad(
    dy: Tensor, kept: Sequence[Tensor], draw: Draw, x_shape: torch.Size, weight_shape: torch.Size,
    geometry: ConvGeometry,
) -> Tensor:  # fmt: skip
    """The compact dW [K, O/G, R, S] from dY [N, O, P, Q] and the store."""
    if _is_product(weight_shape, geometry):
        return _token_wgrad(kept, dy, 1, draw)[:, :, None, None]
    out_channels, group_size, *kernel = weight_shape
    left, _, top, _ = geometry.overhang
    padding = (geometry.padding[0] + top, geometry.padding[1] + left)
    skips = _skips_pixels(weight_shape, geometry)
    options = (1, 1) if skips else geometry.stride, padding, geometry.dilation, draw.proxy.dtype
    store, scale, zero = kept
    group = (group_size, out_channels // geometry.groups)
    if geometry.groups > 1 and draw.bits == 8:
        return grouped_wgrad(store, dy, draw.channels, group, kernel, *options, scale=scale, zero=zero)
    if draw.bits:
        size = (store.shape[0], x_shape[0], *(dy.shape[2:] if skips else x_shape[2:]))
        store = dequantize_channels(store, scale, zero, "planes", draw.bits, size, dy.dtype)
    if geometry.groups > 1:
        return grouped_wgrad(store, dy, draw.channels, group, kernel, *options)
    return conv_wgrad(store, dy, kernel, *options)


def _ticket(draw: Draw) -> Ticket | None:
    """A ticket for a forward; compiled code takes none, as it cannot hold Python objects."""
    return None if torch.compiler.is_compiling() else Ticket(draw)


def _redeem(ticket: Ticket | None) -> None:
    if ticket is not None:
        ticket.redeem()


def _conv_dgrad(dy: Tensor, weight: Tensor, x_shape: torch.Size, geometry: ConvGeometry) -> Tensor:
    """dX [N, C, H, W] from the whole dY and W; the input itself is not needed, only its shape."""
    left, right, top, bottom = geometry.overhang
    padded = (*x_shape[:2], x_shape[2] + top + bottom, x_shape[3] + left + right)
    if dy.is_cuda and dy.is_contiguous(memory_format=torch.channels_last) and not dy.is_contiguous():
        dx = _transposed_dgrad(dy, weight, padded, geometry)
    else:
        x = dy.new_empty(1).expand(padded)
        stride, padding, dilation, groups, _ = geometry
        dx = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (True, False, False)
        )[0]
    return dx[:, :, top : top + x_shape[2], left : left + x_shape[3]]


def _transposed_dgrad(dy: Tensor, weight: Tensor, x_shape: Sequence[int], geometry: ConvGeometry) -> Tensor:
    """The same by a transposed convolution, which on a GPU runs the same kernel of cuDNN.

    convolution_backward first copies dY into the memory format of its input, and an input without storage can only be
    contiguous: a channels_last dY would be copied there and back.
    """
    stride, padding, dilation, groups, _ = geometry
    reach = [
        (size - 1) * step - 2 * pad + (taps - 1) * gap + 1
        for size, step, pad, taps, gap in zip(dy.shape[2:], stride, padding, weight.shape[2:], dilation, strict=True)
    ]
    rest = [size - end for size, end in zip(x_shape[2:], reach, strict=True)]
    with torch.autocast(dy.device.type, enabled=False):
        return F.conv_transpose2d(dy, weight, None, stride, padding, rest, groups, dilation)
