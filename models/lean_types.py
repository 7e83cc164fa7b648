"""timm's layer types and their lean classes, taught to the library when this file is imported."""

import timm.layers
from timm.layers.grn import GlobalResponseNorm
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.efficientformer import Attention as EfficientFormerAttention
from timm.models.efficientvit_mit import LiteMLA
from timm.models.eva import EvaAttention
from timm.models.maxxvit import Attention2d, AttentionCl
from timm.models.regnet import RegNet
from timm.models.swin_transformer import WindowAttention
from torch import nn

from trady_triton.models.activation import LeanGELU, LeanGELUTanh
from trady_triton.models.attention import (
    LeanAttention,
    LeanAttention2d,
    LeanAttentionCl,
    LeanEfficientFormerAttention,
    LeanEvaAttention,
    LeanLiteMLA,
    LeanWindowAttention,
)
from trady_triton.models.gate import LeanEffectiveSEModule, LeanSEModule, LeanSqueezeExcite
from trady_triton.models.layers import LeanAvgPool2dSame, LeanConv2dSame
from trady_triton.models.mlp import LeanGluMlp
from trady_triton.models.norm import (
    LeanBatchNormAct2d,
    LeanGlobalResponseNorm,
    LeanGroupNorm,
    LeanGroupNorm1,
    LeanLayerNorm,
    LeanLayerNorm2d,
    LeanRmsNorm,
)
from trady_triton.models.regnet import LeanRegNet
from trady_triton.nn import register_lean

LEAN_TYPES: dict[type[nn.Module], type[nn.Module]] = {
    timm.layers.Conv2dSame: LeanConv2dSame,
    timm.layers.AvgPool2dSame: LeanAvgPool2dSame,
    timm.layers.GluMlp: LeanGluMlp,
    timm.layers.BatchNormAct2d: LeanBatchNormAct2d,
    timm.layers.LayerNorm: LeanLayerNorm,
    timm.layers.LayerNorm2d: LeanLayerNorm2d,
    timm.layers.GroupNorm: LeanGroupNorm,
    timm.layers.GroupNorm1: LeanGroupNorm1,
    timm.layers.RmsNorm: LeanRmsNorm,
    GlobalResponseNorm: LeanGlobalResponseNorm,
    timm.layers.GELU: LeanGELU,
    timm.layers.GELUTanh: LeanGELUTanh,
    SqueezeExcite: LeanSqueezeExcite,
    SEModule: LeanSEModule,
    EffectiveSEModule: LeanEffectiveSEModule,
    timm.layers.Attention: LeanAttention,
    EvaAttention: LeanEvaAttention,
    WindowAttention: LeanWindowAttention,
    Attention2d: LeanAttention2d,
    AttentionCl: LeanAttentionCl,
    LiteMLA: LeanLiteMLA,
    EfficientFormerAttention: LeanEfficientFormerAttention,
    RegNet: LeanRegNet,
}

for kind, lean in LEAN_TYPES.items():
    register_lean(kind, lean)
