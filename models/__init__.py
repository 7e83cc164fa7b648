"""What trady_triton knows about timm: its layer types, and the paper's networks that it lacks."""

import timm.layers

from trady_triton.models.layers import LeanConv2dSame
from trady_triton.models.norm import LeanBatchNormAct2d
from trady_triton.nn import register_lean

register_lean(timm.layers.Conv2dSame, LeanConv2dSame)
register_lean(timm.layers.BatchNormAct2d, LeanBatchNormAct2d)
