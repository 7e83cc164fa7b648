"""Kernels with a torch twin each: compact stores, sparse weight gradients, fused updates, packed derivatives."""

from .act_pack import act_pack, act_unpack
from .act_store import act_store
from .bias_grad import bias_grad
from .conv_wgrad import conv_wgrad
from .dequantize import dequantize_channels
from .grouped_wgrad import grouped_wgrad
from .quantize import quantize_channels
from .scatter_update import adamw_hyper, scatter_update_, sgd_hyper, update_tables
from .splitk_reduce import splitk_reduce_
from .store import store_channels
from .token_wgrad import token_wgrad
from .wgrad_norm import conv_wgrad_sqnorm, wgrad_sqnorm

__all__ = [
    "act_pack",
    "act_store",
    "act_unpack",
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
