"""Transformers' activations and their lean classes, taught to the library when this file is imported."""

from __future__ import annotations

from torch import Tensor
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from trady_triton.nn import register_lean
from trady_triton.nn.smooth import lean_activation
from trady_triton.policy import Policy


class LeanGELUActivation(GELUActivation):  # type: ignore[misc]
    """Transformers' GELU whose derivative may be packed."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return lean_activation(input, super().forward, "gelu", self.policy)


class LeanGELUTanh(GELUTanh):  # type: ignore[misc]
    """Transformers' GELU by tanh whose derivative may be packed."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return lean_activation(input, super().forward, "gelu_tanh", self.policy)


class LeanSiLUActivation(SiLUActivation):  # type: ignore[misc]
    """Transformers' SiLU whose derivative may be packed."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return lean_activation(input, super().forward, "silu", self.policy)


register_lean(GELUActivation, LeanGELUActivation)
register_lean(GELUTanh, LeanGELUTanh)
register_lean(SiLUActivation, LeanSiLUActivation)
