"""Lean forms of timm's own layer types with "same" padding."""

from __future__ import annotations

from timm.layers import AvgPool2dSame, Conv2dSame, get_same_padding, pad_same
from torch import Tensor

from trady_triton.functional import ConvGeometry, lean_conv2d
from trady_triton.nn.pool import lean_avg_pool2d
from trady_triton.slot import ChannelSlot


class LeanConv2dSame(Conv2dSame):
    """timm's Conv2dSame (TensorFlow's "same" padding) with a frozen weight but for the slot's channels."""

    slot: ChannelSlot | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, H, W] -> [N, O, ceil(H / stride), ceil(W / stride)]."""
        high, wide = (
            get_same_padding(size, kernel, stride, dilation)
            for size, kernel, stride, dilation in zip(
                x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        )
        overhang = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
        geometry = ConvGeometry(self.stride, (0, 0), self.dilation, self.groups, overhang)
        return lean_conv2d(x, self.weight, self.bias, self.slot, geometry)


class LeanAvgPool2dSame(AvgPool2dSame):
    """timm's AvgPool2dSame that keeps nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)]."""
        return lean_avg_pool2d(self, pad_same(x, self.kernel_size, self.stride))
