"""Lean modules: layers that keep for the backward only what the plan trains."""

from torch import nn

from trady_triton.nn.activation import LeanHardsigmoid, LeanHardtanh, LeanLeakyReLU, LeanReLU, LeanReLU6
from trady_triton.nn.affine_input import affine
from trady_triton.nn.chain import Chain, LeanSequential
from trady_triton.nn.conv import LeanConv2d
from trady_triton.nn.convert import AppliedPlan, apply_plan, remove_plan
from trady_triton.nn.dropout import LeanDropout
from trady_triton.nn.layer_norm import LeanLayerNorm
from trady_triton.nn.linear import LeanLinear
from trady_triton.nn.norm import LeanBatchNorm1d, LeanBatchNorm2d, LeanBatchNorm3d, LeanSyncBatchNorm
from trady_triton.nn.packed_input import normalized, packed
from trady_triton.nn.pool import LeanAvgPool2d, LeanMaxPool2d
from trady_triton.nn.smooth import LeanGELU, LeanHardswish, LeanSiLU
from trady_triton.nn.units import blocks
from trady_triton.registry import register_lean

register_lean(nn.Conv2d, LeanConv2d)
register_lean(nn.Linear, LeanLinear)
register_lean(nn.BatchNorm1d, LeanBatchNorm1d)
register_lean(nn.BatchNorm2d, LeanBatchNorm2d)
register_lean(nn.BatchNorm3d, LeanBatchNorm3d)
register_lean(nn.SyncBatchNorm, LeanSyncBatchNorm)
register_lean(nn.ReLU, LeanReLU)
register_lean(nn.ReLU6, LeanReLU6)
register_lean(nn.LeakyReLU, LeanLeakyReLU)
register_lean(nn.Hardtanh, LeanHardtanh)
register_lean(nn.Hardsigmoid, LeanHardsigmoid)
register_lean(nn.SiLU, LeanSiLU)
register_lean(nn.GELU, LeanGELU)
register_lean(nn.Hardswish, LeanHardswish)
register_lean(nn.LayerNorm, LeanLayerNorm)
register_lean(nn.GroupNorm, packed(nn.GroupNorm))
register_lean(nn.RMSNorm, packed(nn.RMSNorm, normalized))
register_lean(nn.Dropout, LeanDropout)
register_lean(nn.MaxPool2d, LeanMaxPool2d)
register_lean(nn.AvgPool2d, LeanAvgPool2d)
register_lean(nn.Sequential, LeanSequential)
_AFFINE: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.AvgPool1d)
_PACKED: tuple[type[nn.Module], ...] = (nn.ELU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh)
for _kind in _AFFINE:
    register_lean(_kind, affine(_kind))  # type: ignore[arg-type]
for _kind in _PACKED:
    register_lean(_kind, packed(_kind))  # type: ignore[arg-type]

__all__ = [
    "AppliedPlan",
    "Chain",
    "LeanConv2d",
    "LeanLinear",
    "affine",
    "apply_plan",
    "blocks",
    "packed",
    "register_lean",
    "remove_plan",
]
