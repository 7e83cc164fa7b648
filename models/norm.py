"""Lean forms of timm's normalisation layers."""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d, GroupNorm, GroupNorm1, LayerNorm, LayerNorm2d, RmsNorm
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor

from trady_triton.nn.group_norm import lean_group_norm, lean_rms_norm
from trady_triton.nn.layer_norm import lean_layer_norm
from trady_triton.nn.norm import lean_batch_norm
from trady_triton.nn.packed import packed_call
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


class LeanGroupNorm(GroupNorm):
    """timm's GroupNorm that may keep one byte an element."""

    policy: Policy = Policy()

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, *S] -> the same shape."""
        return super().forward(x) if self._fast_norm else lean_group_norm(self, x, self.policy)


class LeanGroupNorm1(GroupNorm1):
    """timm's GroupNorm of one group that may keep one byte an element."""

    policy: Policy = Policy()

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, *S] -> the same shape."""
        return super().forward(x) if self._fast_norm else lean_group_norm(self, x, self.policy)


class LeanRmsNorm(RmsNorm):
    """timm's RMSNorm that may keep one byte an element."""

    policy: Policy = Policy()

    def forward(self, x: Tensor) -> Tensor:
        """Input [..., C] -> the same shape."""
        return super().forward(x) if self._fast_norm else lean_rms_norm(self, x, self.policy)


class LeanGlobalResponseNorm(GlobalResponseNorm):
    """ConvNeXt V2's normalisation of a channel by its norm over the image, which may keep one byte an element."""

    policy: Policy = Policy()

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, H, W, C] or [N, C, H, W], as the module was made for -> the same shape."""

        def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            norm = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
            scale = norm / (norm.mean(dim=self.channel_dim, keepdim=True) + self.eps)
            return x + torch.addcmul(bias.view(self.wb_shape), weight.view(self.wb_shape), x * scale)

        return packed_call(run, x, self.spatial_dim, self.policy, self.weight, self.bias)
