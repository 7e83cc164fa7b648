"""Shipped configs of wgrad_sqnorm: large and small tiles, token-major and planes."""

import torch
from harness import Case

from trady_triton.ops.select_config import Arch, select_config
from trady_triton.ops.wgrad_norm import _wgrad_sqnorm_kernel


def case(layout, C, O):
    config = select_config("wgrad_sqnorm", {"T": 25088, "C": C, "O": O}, torch.bfloat16, Arch("sm_90"))
    PQ = 1 if layout == "tokens" else 784
    names = ["T", "C", "O", "x_image", "dy_image"] + ["x_pixel", "dy_pixel"] * (PQ == 1)
    constexprs = {"X_PQ": PQ, "PQ": PQ, "X_CHANNEL": PQ, "CHANNEL": PQ, "WIDE": False, "PREC": "ieee", "UP": False}
    if PQ > 1:
        constexprs |= {"x_pixel": 1, "dy_pixel": 1}
    return Case(
        f"wgrad_sqnorm {layout} {config.meta['BM']}x{config.meta['BN']}x{config.meta['BK']}",
        _wgrad_sqnorm_kernel,
        {"x_ptr": "*bf16", "dy_ptr": "*bf16", "out_ptr": "*fp32", **dict.fromkeys(names, "i32")},
        {**constexprs, **config.meta},
        aligned=("x_ptr", "dy_ptr", "out_ptr", "T", "C", "O", "x_image", "dy_image"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        ci=layout == "tokens" and C == 768,
        matrix=True,
        warpgroup=config.meta["BM"] >= 64,
        wide_loads=True,
    )


CASES = [case(layout, C, O) for layout in ("tokens", "nchw28") for C, O in ((768, 3072), (256, 768), (16, 8192))]
