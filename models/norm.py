"""Lean forms of timm's normalisation layers."""

from __future__ import annotations

from timm.layers import BatchNormAct2d
from torch import Tensor

from trady_triton.nn.norm import lean_batch_norm
from trady_triton.policy import Policy


class LeanBatchNormAct2d(BatchNormAct2d):
    """timm's BatchNorm with drop and activation inside, whose norm keeps nothing while it is frozen."""

    policy: Policy = Policy()

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, H, W] -> the same shape."""
        y = lean_batch_norm(self, x, self.policy)
        return super().forward(x) if y is None else self.act(self.drop(y))
