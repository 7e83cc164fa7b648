"""Shipped configs of grouped_wgrad: both kernels by image size, taps and layout, with the tile of their rules."""

import torch
from harness import Case

from trady_triton.ops.depthwise_wgrad import _depthwise_wgrad_kernel
from trady_triton.ops.grouped_wgrad import _grouped_wgrad_kernel
from trady_triton.ops.select_config import Arch, select_config

SM_90 = Arch("sm_90")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CI = {("bf16", 56, 3, 1, "nchw"), ("bf16", 7, 5, 1, "nchw")}


def common(size, kernel, stride, layout, dtype, codes):
    """Output size, signature, constants and aligned arguments that both kernels share."""
    P = (size + 2 * (kernel // 2) - kernel) // stride + 1
    signature = {"x_ptr": f"*{dtype}", "dy_ptr": f"*{dtype}", "out_ptr": "*fp32", "channels_ptr": "*i64"}
    if codes:
        signature |= {"x_ptr": "*u8", "scale_ptr": "*bf16", "zero_ptr": "*bf16"}
    signature |= dict.fromkeys(("N", "C_GROUP", "M", "image", "pixel", "steps"), "i32")
    constexprs = {
        "H": size, "W": size, "Q": P, "S": kernel, "STRIDE_H": stride, "STRIDE_W": stride, "TOP": kernel // 2,
        "LEFT": kernel // 2, "DILATION_H": 1, "DILATION_W": 1, "CHANNEL": 1 if layout == "nhwc" else P * P,
        "PREC": "ieee", "UP": False,
    }  # fmt: skip
    if layout == "nchw":  # the JIT makes a constant of a stride of one
        del signature["pixel"]
        constexprs["pixel"] = 1
    aligned = ("x_ptr", "dy_ptr", "out_ptr", "channels_ptr", "image", *(("pixel",) if layout == "nhwc" else ()))
    return P, signature, constexprs, aligned


def depthwise(size, kernel, stride=1, layout="nchw", dtype="bf16", codes=False):
    P, signature, constexprs, aligned = common(size, kernel, stride, layout, dtype, codes)
    shape = {
        "ROWS": 24, "N": 128, "W": size, "P": P, "Q": P, "R": kernel, "S": kernel,
        "STRIDE_W": stride, "LEFT": kernel // 2, "DILATION_W": 1,
    }  # fmt: skip
    config = select_config("depthwise_wgrad", shape, DTYPES[dtype], SM_90)
    del signature["C_GROUP"], signature["M"]  # one: constants too
    tile = "x".join(str(config.meta[name]) for name in ("RB", "BQ", "BW", "BK"))
    return Case(
        f"depthwise_wgrad {dtype} {kernel}x{kernel} stride {stride} {layout}{size} {tile}" + " codes" * codes,
        _depthwise_wgrad_kernel,
        signature | {"ROWS": "i32"},
        constexprs | {"P": P, "R": kernel, "C_GROUP": 1, "M": 1, **config.meta},
        aligned=aligned,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        ci=(dtype, size, kernel, stride, layout) in CI,
        matrix=dtype == "bf16",
        max_registers=188 if codes else 168,  # 4 filter rows of codes wait in registers to be scaled
    )


def grouped(size, kernel, M, layout, dtype="bf16", codes=False):
    P, signature, constexprs, aligned = common(size, kernel, 1, layout, dtype, codes)
    shape = {"K": 24, "M": M, "TAPS": kernel * kernel, "T": 128 * P * P}
    config = select_config("grouped_wgrad", shape, DTYPES[dtype], SM_90)
    tile = "x".join(str(config.meta[name]) for name in ("BM", "BN", "BK"))
    return Case(
        f"grouped_wgrad {dtype} {kernel}x{kernel} {layout}{size} {tile}" + " codes" * codes,
        _grouped_wgrad_kernel,
        signature | {"K": "i32"},
        constexprs | {"PQ": P * P, "TAPS": kernel * kernel, **config.meta},
        aligned=(*aligned, "M", "C_GROUP"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        ci=(size, kernel, M, layout, dtype) == (56, 3, 16, "nchw", "bf16"),
        matrix=dtype == "bf16",
    )


CASES = [depthwise(size, kernel) for size in (112, 56, 28, 14, 7) for kernel in (3, 5, 7)]
CASES += [depthwise(size, kernel, stride=2) for size in (112, 56, 14) for kernel in (3, 5)]
CASES += [depthwise(size, kernel, layout="nhwc") for size in (56, 14) for kernel in (3, 7)]
CASES += [depthwise(size, kernel, dtype="fp32") for size in (56, 14, 7) for kernel in (3, 7)]
CASES += [grouped(size, 3, M, layout) for size in (56, 14) for M in (16, 64) for layout in ("nchw", "nhwc")]
CASES += [grouped(28, 5, 32, "nchw"), grouped(28, 7, 16, "nchw"), grouped(28, 3, 16, "nchw", "fp32")]
CASES += [depthwise(size, kernel, codes=True) for size in (56, 14) for kernel in (3, 7)]
CASES += [grouped(56, 3, 16, "nchw", codes=True)]
