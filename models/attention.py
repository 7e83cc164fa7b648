"""timm's attention modules, recomputed from their input where the policy says so."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention

from trady_triton.nn.recompute import run_recomputed
from trady_triton.policy import Policy


class _Recomputable:
    """Runs the next class's forward as it is, or recomputed in the backward."""

    policy: Policy = Policy()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        return (
            forward(*args, **kwargs)
            if self.policy.attention == "keep"
            else run_recomputed(self, forward, *args, **kwargs)
        )


class LeanAttention(_Recomputable, Attention):
    """The attention of ViT, DeiT and their kin."""


class LeanEvaAttention(_Recomputable, EvaAttention):
    """The attention of EVA, with rotary positions."""


class LeanWindowAttention(_Recomputable, WindowAttention):
    """The window attention of Swin."""
