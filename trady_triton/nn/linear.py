"""Lean Linear: nn.Linear that trains only the input features of its slot and keeps no input otherwise."""

from __future__ import annotations

from torch import Tensor, nn

from trady_triton.functional import lean_linear
from trady_triton.slot import ChannelSlot


class LeanLinear(nn.Linear):
    """nn.Linear with a frozen weight of which the slot's input features are trained; without a slot none."""

    slot: ChannelSlot | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., C] -> [..., O]."""
        return lean_linear(input, self.weight, self.bias, self.slot)
