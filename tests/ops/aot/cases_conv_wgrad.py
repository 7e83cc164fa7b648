"""Shipped configs of conv_wgrad: image size x layout of dy x number of rows, with the tile that its rule gives."""

import torch
from harness import Case

from trady_triton.ops.conv_wgrad import _conv_wgrad_kernel
from trady_triton.ops.select_config import Arch, select_config

SM_90 = Arch("sm_90")
CI = {(56, 8, "nhwc"), (14, 8, "nchw")}


def case(size, K, layout, *, kernel=3, stride=1, partial=True):
    pad = (kernel - 1) // 2
    P = (size + 2 * pad - kernel) // stride + 1
    PQ, taps = P * P, kernel * kernel
    shape = {"T": 128 * PQ, "O": 256, "K": K, "TAPS": taps, "PQ": PQ}
    config = select_config("conv_wgrad", shape, torch.bfloat16, SM_90)
    signature = {"x_ptr": "*bf16", "dy_ptr": "*bf16", "out_ptr": "*fp32"}
    signature |= dict.fromkeys(("N", "O", "K", "UNITS", "image", "pixel", "steps"), "i32")
    constexprs = {
        "H": size, "W": size, "PQ": PQ, "Q": P, "TAPS": taps, "S": kernel, "STRIDE_H": stride, "STRIDE_W": stride,
        "TOP": pad, "LEFT": pad, "DILATION_H": 1, "DILATION_W": 1,
        "CHANNEL": 1 if layout == "nhwc" else PQ, "PARTIAL": partial, "PREC": "ieee", "UP": False, **config.meta,
    }  # fmt: skip
    if layout == "nchw":  # the JIT makes a constant of a stride of one
        del signature["pixel"]
        constexprs["pixel"] = 1
    tile = "x".join(str(config.meta[name]) for name in ("BM", "BN", "BK"))
    return Case(
        f"conv_wgrad {kernel}x{kernel} stride {stride} {layout}{size} {tile}" + ("" if partial else " one split"),
        _conv_wgrad_kernel,
        signature,
        constexprs,
        aligned=("x_ptr", "dy_ptr", "out_ptr", "O", "image", *(("pixel",) if layout == "nhwc" else ())),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        ci=(size, K, layout) in CI and partial and kernel == 3,
        matrix=True,
        max_registers=168 if partial else 188,  # writing [K, O, TAPS] directly costs addresses, after the loop
        max_shared_bytes=(160 if config.meta["BM"] == 256 else 113) << 10,
    )


CASES = [case(size, K, "nchw") for size in (56, 28, 14, 7) for K in (8, 32)]
CASES += [case(size, K, "nhwc") for size in (56, 14, 7) for K in (8, 32)]
CASES += [case(14, K, layout, partial=False) for K in (8, 32) for layout in ("nchw", "nhwc")]
CASES += [case(56, 8, layout, kernel=3, stride=2) for layout in ("nchw", "nhwc")]
CASES += [case(56, 8, layout, kernel=2, stride=2) for layout in ("nchw", "nhwc")]
CASES += [case(224, 3, layout, kernel=7, stride=2) for layout in ("nchw", "nhwc")]
