"""Shipped configs of token_wgrad: K bucket x layout of dy, with the tile that its rule gives."""

import torch
from harness import Case

from trady_triton.ops.select_config import Arch, select_config
from trady_triton.ops.token_wgrad import _token_wgrad_kernel

LAYOUTS = {  # name: (PQ, CHANNEL, run-time strides known to be multiples of 16)
    "tokens": (1, 1, ("image",)),
    "nchw56": (56 * 56, 56 * 56, ("image",)),
    "nchw14": (14 * 14, 14 * 14, ("image",)),
    "nchw7": (7 * 7, 7 * 7, ("image",)),
}
CI = {("tokens", 8), ("tokens", 64), ("nchw14", 128)}


def case(layout, K, *, T=25088, ones=False, atomic=False):
    PQ, CHANNEL, aligned = LAYOUTS[layout]
    config = select_config("token_wgrad", {"T": T, "O": 768, "K": K, "PQ": PQ}, torch.bfloat16, Arch("sm_90"))
    signature = {"x_ptr": "*bf16", "dy_ptr": "*bf16", "out_ptr": "*fp32", "pixel": "i32"}
    signature |= dict.fromkeys(("T", "O", "K", "row_units", "image", "blocks_per_split"), "i32")
    constexprs = {"PQ": PQ, "CHANNEL": CHANNEL, "UNIT": 8, "WIDE": False, "ONES": ones, "ATOMIC": atomic}
    peel = T % 16 != 0
    constexprs |= {"PREC": "ieee", "UP": False, "PEEL": peel, **config.meta}
    if layout != "tokens":  # the JIT makes a constant of a stride of one
        del signature["pixel"]
        constexprs["pixel"] = 1
    tile = "x".join(str(size) for size in config.meta.values())
    return Case(
        f"token_wgrad {layout} {tile}" + " ones" * ones + " atomic" * atomic + " peel" * peel,
        _token_wgrad_kernel,
        signature,
        constexprs,
        aligned=("x_ptr", "dy_ptr", "out_ptr", "O", *aligned, *(() if peel else ("T",))),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        ci=(layout, K) in CI and not (ones or atomic),
        matrix=True,
        max_registers=255 if peel else 168,
        max_shared_bytes=(160 if K >= 128 else 113) << 10,
    )


CASES = [case(layout, K) for layout in LAYOUTS for K in (8, 32, 64, 128, 256)]
CASES += [case("tokens", 63, ones=True), case("tokens", 63, atomic=True)]
CASES += [case("tokens", K, T=25084) for K in (16, 64)]
