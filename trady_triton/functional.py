"""Convolution and Linear that keep for the backward only what the drawn channels need.

Shapes: N batch, C input channels, K drawn channels, O output channels, G groups, R x S kernel, T tokens.
Forward keeps x[:, channels] (a compact copy) if channels are drawn, and a reference to W if x needs a gradient.
Backward computes dX where somebody needs it and the compact dW of the drawn channels (eq. 2), channel-major.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from trady_triton.cost import keeps_strided_pixels
from trady_triton.slot import ChannelSlot, Draw, Ticket


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
    """Like `F.conv2d`, training only the slot's channels: x [N, C, H, W], weight [O, C/G, R, S] -> [N, O, P, Q].

    Raises:
        RuntimeError: the weight itself requires a gradient, or was moved since the draw.
    """
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
    if slot is None or slot.channels.numel() == 0 or not torch.is_grad_enabled():
        return None
    if slot.is_stale:
        raise RuntimeError(
            f"layer {slot.layer!r}: the weight is {weight.dtype} on {weight.device}, its channels were drawn for "
            f"{slot.proxy.dtype} on {slot.proxy.device}; call optimizer.resample(epoch)"
        )
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
        store = None
        if ctx.needs_input_grad[3] and draw is not None:
            store = _keep_pixels(seen, draw.channels, weight, geometry)
            ctx.ticket = Ticket(draw)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, store)
        ctx.geometry, ctx.draw, ctx.x_shape, ctx.weight_shape = geometry, draw, x.shape, weight.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, store = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _conv_dgrad(dy, weight.to(dy.dtype), ctx.x_shape, ctx.geometry)
        if ctx.needs_input_grad[2]:
            db = dy.sum((0, 2, 3))
        if ctx.needs_input_grad[3]:
            ctx.ticket.redeem()
            dw = _conv_wgrad(dy, store, ctx.draw.channels, ctx.weight_shape, ctx.geometry).to(ctx.draw.proxy.dtype)
        return dx, None, db, dw, None, None


class _LeanLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, proxy: Tensor | None, draw: Draw | None
    ) -> Tensor:
        x, w, b = _as_autocast(x, weight, bias)
        store = None
        if ctx.needs_input_grad[3] and draw is not None:
            store = x.index_select(-1, draw.channels)
            ctx.ticket = Ticket(draw)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, store)
        ctx.draw = draw
        return F.linear(x, w, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, store = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(dy.dtype)
        if ctx.needs_input_grad[2]:
            db = dy.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[3]:
            ctx.ticket.redeem()
            dw = (store.flatten(0, -2).t() @ dy.flatten(0, -2)).to(ctx.draw.proxy.dtype)
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


def _keep_pixels(x: Tensor, channels: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """The compact store [N, K, H, W]; of a strided 1x1 convolution only the pixels that the stride keeps."""
    if _skips_pixels(weight.shape, geometry):
        x = x[:, :, :: geometry.stride[0], :: geometry.stride[1]]
    return x.index_select(1, channels)


def _skips_pixels(weight_shape: torch.Size, geometry: ConvGeometry) -> bool:
    return keeps_strided_pixels(tuple(weight_shape[2:]), geometry.padding) and not any(geometry.overhang)


def _conv_dgrad(dy: Tensor, weight: Tensor, x_shape: torch.Size, geometry: ConvGeometry) -> Tensor:
    """dX [N, C, H, W] from the whole dY and W; the input itself is not needed, only its shape."""
    stride, padding, dilation, groups, overhang = geometry
    left, right, top, bottom = overhang
    padded = (*x_shape[:2], x_shape[2] + top + bottom, x_shape[3] + left + right)
    x = dy.new_empty(1).expand(padded)
    dx = _convolution_backward(dy, x, weight, stride, padding, dilation, groups, (True, False))[0]
    return dx[:, :, top : top + x_shape[2], left : left + x_shape[3]]


def _conv_wgrad(
    dy: Tensor, store: Tensor, channels: Tensor, weight_shape: torch.Size, geometry: ConvGeometry
) -> Tensor:
    """The compact dW [K, O/G, R, S] from dY [N, O, P, Q] and the store [N, K, H, W]."""
    stride, padding, dilation, groups, overhang = geometry
    if _skips_pixels(weight_shape, geometry):
        stride = (1, 1)
    padded = F.pad(store, overhang) if any(overhang) else store
    count, (out_channels, group_size, *kernel) = channels.numel(), weight_shape
    if groups == 1:
        weight = dy.new_empty(1).expand(out_channels, count, *kernel)
        dw = _convolution_backward(dy, padded, weight, stride, padding, dilation, 1, (False, True))[1]
        return dw.transpose(0, 1).contiguous()
    # A drawn channel reaches only the outputs of its group: convolve each as a group of its own.
    grouped = rearrange(dy, "n (g o) p q -> n g o p q", g=groups).index_select(1, channels // group_size)
    dy = rearrange(grouped, "n k o p q -> n (k o) p q")
    weight = dy.new_empty(1).expand(dy.shape[1], 1, *kernel)
    dw = _convolution_backward(dy, padded, weight, stride, padding, dilation, count, (False, True))[1]
    return rearrange(dw, "(k o) 1 r s -> k o r s", k=count)


def _convolution_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """(dX, dW) of a convolution; of an operand whose gradient alone is wanted only the shape matters."""
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (*wanted, False)
    )
    return dx, dw
