"""Lean Linear: nn.Linear that trains only the input features of its slot and keeps no input otherwise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trady_triton.functional import lean_linear
from trady_triton.slot import ChannelSlot


class LeanLinear(nn.Linear):
    """nn.Linear with a frozen weight of which the slot's input features are trained; without a slot none."""

    slot: ChannelSlot | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., C] -> [..., O]."""
        if self._is_lean_already(input):
            return super().forward(input)
        return lean_linear(input, self.weight, self.bias, self.slot)

    def _is_lean_already(self, x: Tensor) -> bool:
        """Whether torch keeps no more than the weight itself: it is frozen, not drawn from, and not cast.

        Then a recomputed block can stop before its last product, as it cannot before a custom Function.
        """
        drawn = self.slot is not None and self.slot.is_drawn
        return not drawn and not self.weight.requires_grad and not torch.is_autocast_enabled(x.device.type)
