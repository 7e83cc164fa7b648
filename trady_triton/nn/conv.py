"""Lean Conv2d: nn.Conv2d that trains only the input channels of its slot and keeps no input otherwise."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trady_triton.functional import ConvGeometry, lean_conv2d
from trady_triton.slot import ChannelSlot


class LeanConv2d(nn.Conv2d):
    """nn.Conv2d with a frozen weight of which the slot's input channels are trained; without a slot none."""

    slot: ChannelSlot | None = None

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return lean_conv2d(input, weight, bias, self.slot, self.geometry(input))

    def geometry(self, x: Tensor) -> ConvGeometry:
        """How the layer reads x [N, C, H, W]."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        stride, dilation = tuple(self.stride), tuple(self.dilation)
        if self.padding_mode != "zeros":
            return ConvGeometry(stride, (0, 0), dilation, self.groups)
        if left == right and top == bottom:
            return ConvGeometry(stride, (top, left), dilation, self.groups)
        return ConvGeometry(stride, (0, 0), dilation, self.groups, (left, right, top, bottom))
