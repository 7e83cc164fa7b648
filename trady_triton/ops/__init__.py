"""Kernels with a torch twin each: compact stores, sparse weight gradients, fused updates, packed derivatives.

No lean layer calls `act_store`: an activation does not know which layer reads it. Code that has both in hand may.
"""

from trady_triton.ops.act_pack import act_pack, act_pack_, act_unpack
from trady_triton.ops.act_store import act_store
from trady_triton.ops.bias_grad import bias_grad
from trady_triton.ops.conv_wgrad import conv_wgrad
from trady_triton.ops.dequantize import dequantize_channels
from trady_triton.ops.grouped_wgrad import grouped_wgrad
from trady_triton.ops.quantize import quantize_channels
from trady_triton.ops.scatter_update import adamw_corrections, adamw_hyper, scatter_update_, sgd_hyper, update_tables
from trady_triton.ops.splitk_reduce import splitk_reduce_
from trady_triton.ops.store import store_channels
from trady_triton.ops.token_wgrad import token_wgrad
from trady_triton.ops.wgrad_norm import conv_wgrad_sqnorm, wgrad_sqnorm

__all__ = [
    "act_pack",
    "act_pack_",
    "act_store",
    "act_unpack",
    "adamw_corrections",
    "adamw_hyper",
    "bias_grad",
    "conv_wgrad",
    "conv_wgrad_sqnorm",
    "dequantize_channels",
    "grouped_wgrad",
    "quantize_channels",
    "scatter_update_",
    "sgd_hyper",
    "splitk_reduce_",
    "store_channels",
    "token_wgrad",
    "update_tables",
    "wgrad_sqnorm",
]
