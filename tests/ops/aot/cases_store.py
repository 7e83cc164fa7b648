"""Shipped configs of the compact stores: copied, quantised and read back."""

import torch
from harness import Case

from trady_triton.ops.dequantize import GROUP, _dequantize_kernel, half_group
from trady_triton.ops.quantize import _quantize_kernel
from trady_triton.ops.select_config import Arch, select_config
from trady_triton.ops.store import _store_kernel

SOURCES = {  # name: (PQ, Q, strides that are constant 1, strides divisible by 16)
    "tokens": (1, 1, ("sc",), ("sn",)),
    "nchw56": (3136, 3136, ("sq",), ("sn", "sp", "sc")),
    "nchw7": (49, 49, ("sq",), ()),
}
RUN_TIME = {"T": "i32", "K": "i32"}


def source(name):
    """(run-time strides, constexprs, aligned arguments) of a source layout."""
    PQ, Q, ones, aligned = SOURCES[name]
    strides = {stride: "i32" for stride in ("sn", "sp", "sq", "sc") if stride not in ones}
    return strides, {"PQ": PQ, "Q": Q, **dict.fromkeys(ones, 1)}, aligned


def copy(name, pixel_major):
    config = select_config("store", {"T": 25088, "K": 48}, torch.bfloat16, Arch("sm_90"))
    strides, constants, aligned = source(name)
    return Case(
        f"store {name} {'pixel' if pixel_major else 'channel'}-major",
        _store_kernel,
        {"x_ptr": "*bf16", "channels_ptr": "*i64", "out_ptr": "*bf16", **RUN_TIME, "so": "i32", **strides},
        {**constants, "UNIT": 8, "PIXEL_MAJOR": pixel_major, **config.meta},
        aligned=("x_ptr", "channels_ptr", "out_ptr", "T", *aligned),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        ci=name == "nchw56" and not pixel_major,
    )


def quantize(name, bits, G, stochastic):
    config = select_config("quantize", {"T": 25088, "K": 48, "bits": bits}, torch.bfloat16, Arch("sm_90"))
    strides, constants, aligned = source(name)
    signature = {
        "x_ptr": "*bf16",
        "channels_ptr": "*i64",
        "codes_ptr": "*u8",
        "scale_ptr": "*bf16",
        "zero_ptr": "*bf16",
    }
    signature |= {"seed_ptr": "*i64"} if stochastic else {}
    signature |= {**RUN_TIME, "groups": "i32", "row_units": "i32", **strides}
    constants |= {"G": G, "HALF": half_group(G), "UNIT": 16, "TOP": 2**bits - 1, "HALVES": bits == 4}
    return Case(
        f"quantize {name} int{bits} groups of {G}" + " stochastic" * stochastic,
        _quantize_kernel,
        signature,
        {**constants, **config.meta},
        aligned=(*tuple(name for name in signature if name.endswith("_ptr")), "T", *aligned),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        ci=stochastic and name == "tokens" and bits == 4,
    )


def dequantize(bits, G):
    config = select_config("dequantize", {"T": 25088, "K": 48}, torch.bfloat16, Arch("sm_90"))
    pointers = {"codes_ptr": "*u8", "scale_ptr": "*bf16", "zero_ptr": "*bf16", "out_ptr": "*bf16"}
    constants = {"G": G, "HALF": half_group(G), "UNIT": 16, "OUT_UNIT": 16, "HALVES": bits == 4}
    return Case(
        f"dequantize int{bits} groups of {G}",
        _dequantize_kernel,
        {**pointers, **dict.fromkeys(("T", "K", "groups", "row_units", "out_units"), "i32")},
        {**constants, **config.meta},
        aligned=(*pointers, "T"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


CASES = [copy(name, pixel_major) for name in SOURCES for pixel_major in (False, True)]
CASES += [quantize("tokens", bits, GROUP, stochastic) for bits in (8, 4) for stochastic in (False, True)]
CASES += [quantize("nchw56", bits, G, True) for bits in (8, 4) for G in (GROUP, 56 * 56)]
CASES += [dequantize(bits, G) for bits in (8, 4) for G in (GROUP, 56 * 56)]
