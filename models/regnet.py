"""timm's RegNet as a chain of blocks, so that what is recomputed at once may reach over a stage's end."""

from __future__ import annotations

from timm.models.regnet import RegNet
from torch import Tensor, nn

from trady_triton.nn import Chain


class LeanRegNet(Chain, RegNet):
    """RegNet whose blocks can be recomputed in runs. With runs it calls the blocks, not the stages around them."""

    def links(self) -> list[nn.Module]:
        """Stem, blocks of all stages, last convolution."""
        stages = (self.s1, self.s2, self.s3, self.s4)
        return [self.stem, *(block for stage in stages for block in stage.children()), self.final_conv]

    def forward_features(self, x: Tensor) -> Tensor:
        """Image [N, 3, H, W] -> [N, C, H / 32, W / 32]."""
        return self.call_links(x)
