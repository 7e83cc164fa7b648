"""Lean forms of timm's normalisation layers."""

from __future__ import annotations

from timm.layers import BatchNormAct2d, LayerNorm, LayerNorm2d
from torch import Tensor

from trady_triton.nn.layer_norm import lean_layer_norm
from trady_triton.nn.norm import lean_batch_norm
from trady_triton.policy import Policy


class LeanBatchNormAct2d(BatchNormAct2d):
    """timm's BatchNorm with drop and activation inside, whose norm keeps nothing while it is frozen."""

    policy: Policy = Policy()

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, H, W] -> the same shape."""
        y = lean_batch_norm(self, x, self.policy)
        return super().forward(x) if y is None else self.act(self.drop(y))


class LeanLayerNorm(LayerNorm):
    """timm's LayerNorm that may keep one byte an element."""

    policy: Policy = Policy()

    def forward(self, x: Tensor) -> Tensor:
        """Input [..., C] -> the same shape."""
        return super().forward(x) if self._fast_norm else lean_layer_norm(self, x, self.policy)


class LeanLayerNorm2d(LayerNorm2d):
    """timm's LayerNorm over the channels of an image that may keep one byte an element."""

    policy: Policy = Policy()

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, H, W] -> the same shape."""
        if self._fast_norm:
            return super().forward(x)
        return lean_layer_norm(self, x.permute(0, 2, 3, 1), self.policy).permute(0, 3, 1, 2)
