"""Lean forms of timm's activations."""

from __future__ import annotations

from timm.layers import GELU, GELUTanh
from torch import Tensor

from trady_triton.nn.smooth import lean_activation
from trady_triton.policy import Policy


class LeanGELU(GELU):
    """timm's GELU whose derivative may be packed."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return lean_activation(input, super().forward, "gelu", self.policy)


class LeanGELUTanh(GELUTanh):
    """timm's GELU by tanh whose derivative may be packed."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return lean_activation(input, super().forward, "gelu_tanh", self.policy)
