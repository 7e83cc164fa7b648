"""Layer types of timm and torchvision and their lean classes, taught to the library when this file is imported."""

import timm.layers as layers
import torchvision.models.convnext
import torchvision.ops.misc
from timm.layers.activations import QuickGELU
from timm.layers.cbam import ChannelAttn, SpatialAttn
from timm.layers.grn import GlobalResponseNorm
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.metaformer import GroupNorm1NoBias, LayerNorm2dNoBias, LayerNormNoBias, StarReLU
from timm.models.regnet import RegNet
from timm.models.senet import SEModule as LegacySEModule
from torch import Tensor, nn

from trady_triton.models.activation import LeanGELU, LeanGELUTanh
from trady_triton.models.layers import LeanAvgPool2dSame, LeanConv2dSame
from trady_triton.models.mlp import LeanGluMlp
from trady_triton.models.norm import LeanBatchNormAct2d, LeanLayerNorm, LeanLayerNorm2d
from trady_triton.models.regnet import LeanRegNet
from trady_triton.nn import register_lean
from trady_triton.nn.affine_input import affine
from trady_triton.nn.packed_input import normalized, packed

WRITTEN: dict[type[nn.Module], type[nn.Module]] = {
    layers.Conv2dSame: LeanConv2dSame,
    layers.AvgPool2dSame: LeanAvgPool2dSame,
    layers.GluMlp: LeanGluMlp,
    layers.BatchNormAct2d: LeanBatchNormAct2d,
    layers.LayerNorm: LeanLayerNorm,
    layers.LayerNorm2d: LeanLayerNorm2d,
    layers.GELU: LeanGELU,
    layers.GELUTanh: LeanGELUTanh,
    RegNet: LeanRegNet,
}
AFFINE = (
    layers.StdConv2d, layers.StdConv2dSame, layers.ScaledStdConv2d, layers.ScaledStdConv2dSame, layers.BlurPool2d,
)  # fmt: skip
PACKED = (
    # norms of an image
    layers.GroupNorm, layers.GroupNorm1, layers.GroupNormAct, layers.GroupNorm1Act, layers.RmsNorm2d,
    layers.RmsNorm2dFp32, layers.RmsNormAct2d, layers.SimpleNorm2d, layers.LayerNorm2dFp32, layers.LayerNormAct2d,
    layers.FilterResponseNormAct2d, layers.FilterResponseNormTlu2d, layers.EvoNorm2dS0, layers.EvoNorm2dS0a,
    layers.EvoNorm2dS1, layers.EvoNorm2dS2, torchvision.models.convnext.LayerNorm2d, GroupNorm1NoBias,
    LayerNorm2dNoBias,
    # gates
    SqueezeExcite, layers.SEModule, layers.EffectiveSEModule, layers.EcaModule, layers.CecaModule, layers.GatherExcite,
    layers.GlobalContext, LegacySEModule, ChannelAttn, SpatialAttn, torchvision.ops.misc.SqueezeExcitation,
    # activations
    layers.Mish, QuickGELU, layers.Sigmoid, layers.Tanh, StarReLU,
)  # fmt: skip
PACKED_ROWS = (
    layers.RmsNorm, layers.RmsNormFp32, layers.RmsNormAct, layers.SimpleNorm, layers.SimpleNormFp32,
    layers.LayerNormAct, layers.LayerNormFp32, LayerNormNoBias,
)  # fmt: skip


def image_dims(module: GlobalResponseNorm, x: Tensor) -> tuple[int, ...]:
    """Where ConvNeXt V2's normalisation finds the pixels of a channel."""
    return module.spatial_dim


for kind, lean in WRITTEN.items():
    register_lean(kind, lean)
for kind in AFFINE:
    register_lean(kind, affine(kind))
for kind in PACKED:
    register_lean(kind, packed(kind))
for kind in PACKED_ROWS:
    register_lean(kind, packed(kind, normalized))
register_lean(GlobalResponseNorm, packed(GlobalResponseNorm, image_dims))
