"""timm's attention modules, recomputed from their input where the policy says so."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models.efficientformer import Attention as EfficientFormerAttention
from timm.models.efficientvit_mit import LiteMLA
from timm.models.eva import EvaAttention
from timm.models.maxxvit import Attention2d, AttentionCl
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


class LeanAttention2d(_Recomputable, Attention2d):
    """The attention of CoAtNet over the pixels of an image [N, C, H, W]."""


class LeanAttentionCl(_Recomputable, AttentionCl):
    """The attention of MaxViT, channels last."""


class LeanLiteMLA(_Recomputable, LiteMLA):
    """The linear attention of EfficientViT."""


class LeanEfficientFormerAttention(_Recomputable, EfficientFormerAttention):
    """The attention of EfficientFormer, with a table of biases."""
