"""timm's layer types and their lean classes, taught to the library when this file is imported."""

import timm.layers
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from torch import nn

from trady_triton.models.activation import LeanGELU, LeanGELUTanh
from trady_triton.models.attention import LeanAttention, LeanEvaAttention, LeanWindowAttention
from trady_triton.models.gate import LeanEffectiveSEModule, LeanSEModule, LeanSqueezeExcite
from trady_triton.models.layers import LeanConv2dSame
from trady_triton.models.norm import LeanBatchNormAct2d, LeanLayerNorm, LeanLayerNorm2d
from trady_triton.nn import register_lean

LEAN_TYPES: dict[type[nn.Module], type[nn.Module]] = {
    timm.layers.Conv2dSame: LeanConv2dSame,
    timm.layers.BatchNormAct2d: LeanBatchNormAct2d,
    timm.layers.LayerNorm: LeanLayerNorm,
    timm.layers.LayerNorm2d: LeanLayerNorm2d,
    timm.layers.GELU: LeanGELU,
    timm.layers.GELUTanh: LeanGELUTanh,
    SqueezeExcite: LeanSqueezeExcite,
    SEModule: LeanSEModule,
    EffectiveSEModule: LeanEffectiveSEModule,
    timm.layers.Attention: LeanAttention,
    EvaAttention: LeanEvaAttention,
    WindowAttention: LeanWindowAttention,
}

for kind, lean in LEAN_TYPES.items():
    register_lean(kind, lean)
