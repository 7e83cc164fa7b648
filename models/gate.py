"""Lean forms of timm's squeeze-and-excitation modules."""

from __future__ import annotations

from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor

from trady_triton.nn.gate import gated
from trady_triton.policy import Policy


class LeanSqueezeExcite(SqueezeExcite):
    """The gate of EfficientNet and MobileNet, whose operand may be packed."""

    policy: Policy = Policy()

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, H, W] -> the same shape."""
        squeezed = self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        return gated(x, self.gate(self.conv_expand(squeezed)), self.policy)


class LeanSEModule(SEModule):
    """The gate of RegNet and ResNet, whose operand may be packed."""

    policy: Policy = Policy()

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, H, W] -> the same shape."""
        if self.add_maxpool:
            return super().forward(x)
        squeezed = self.act(self.bn(self.fc1(x.mean((2, 3), keepdim=True))))
        return gated(x, self.gate(self.fc2(squeezed)), self.policy)


class LeanEffectiveSEModule(EffectiveSEModule):
    """The gate of VoVNet, whose operand may be packed."""

    policy: Policy = Policy()

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, H, W] -> the same shape."""
        if self.add_maxpool:
            return super().forward(x)
        return gated(x, self.gate(self.fc(x.mean((2, 3), keepdim=True))), self.policy)
