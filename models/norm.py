"""Lean forms of timm's normalisation layers."""

from __future__ import annotations

from timm.layers import BatchNormAct2d
from torch import Tensor

from trady_triton.nn.norm import frozen_batch_norm


class LeanBatchNormAct2d(BatchNormAct2d):
    """timm's BatchNorm with drop and activation inside; frozen and in eval mode the norm keeps nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, H, W] -> the same shape."""
        y = frozen_batch_norm(self, x)
        return super().forward(x) if y is None else self.act(self.drop(y))
