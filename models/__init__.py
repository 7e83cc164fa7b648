"""What trady_triton knows about timm: its layer types, and the paper's networks that it lacks."""

import timm.layers
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention

from trady_triton.models.activation import LeanGELU, LeanGELUTanh
from trady_triton.models.attention import LeanAttention, LeanEvaAttention, LeanWindowAttention
from trady_triton.models.gate import LeanEffectiveSEModule, LeanSEModule, LeanSqueezeExcite
from trady_triton.models.layers import LeanConv2dSame
from trady_triton.models.norm import LeanBatchNormAct2d, LeanLayerNorm, LeanLayerNorm2d
from trady_triton.nn import register_lean

register_lean(timm.layers.Conv2dSame, LeanConv2dSame)
register_lean(timm.layers.BatchNormAct2d, LeanBatchNormAct2d)
register_lean(timm.layers.LayerNorm, LeanLayerNorm)
register_lean(timm.layers.LayerNorm2d, LeanLayerNorm2d)
register_lean(timm.layers.GELU, LeanGELU)
register_lean(timm.layers.GELUTanh, LeanGELUTanh)
register_lean(SqueezeExcite, LeanSqueezeExcite)
register_lean(SEModule, LeanSEModule)
register_lean(EffectiveSEModule, LeanEffectiveSEModule)
register_lean(timm.layers.Attention, LeanAttention)
register_lean(EvaAttention, LeanEvaAttention)
register_lean(WindowAttention, LeanWindowAttention)
