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


def case(layout, K, *, T=25088, bits=0, ones=False, atomic=False):
    PQ, CHANNEL, aligned = LAYOUTS[layout]
    shape = {"T": T, "O": 768, "K": K, "PQ": PQ, "bits": bits}
    config = select_config("token_wgrad", shape, torch.bfloat16, Arch("sm_90"))
    peel = T % 16 != 0
    sizes = ["T", "O", "K", "row_units", "image", "n_groups", "blocks_per_split"]
    constexprs = {"PQ": PQ, "CHANNEL": CHANNEL, "UNIT": 16 if bits else 8, "WIDE": False, "ONES": ones}
    constexprs |= {"PEEL": peel, "ATOMIC": atomic, "BITS": bits, "G": 128, "PREC": "ieee", "UP": False}
    if layout == "tokens":
        sizes.append("pixel")
    else:  # the JIT makes a constant of a stride of one
        constexprs["pixel"] = 1
    signature = {"x_ptr": "*bf16", "dy_ptr": "*bf16", "out_ptr": "*fp32", **dict.fromkeys(sizes, "i32")}
    if bits:
        signature |= {"x_ptr": "*u8", "scale_ptr": "*bf16", "zero_ptr": "*bf16"}
    tile = "x".join(str(size) for size in config.meta.values())
    variant = " ones" * ones + " atomic" * atomic + " peel" * peel + f" int{bits}" * (bits > 0)
    return Case(
        f"token_wgrad {layout} {tile}{variant}",
        _token_wgrad_kernel,
        signature,
        {**constexprs, **config.meta},
        aligned=("x_ptr", "dy_ptr", "out_ptr", "O", *aligned, *(() if peel else ("T",))),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        ci=(layout, K) in CI and not variant,
        matrix=True,
        warpgroup=config.meta["BM"] >= 64,
        wide_loads=layout != "nchw7" and not peel and not bits,  # scales are single elements
        max_registers=255 if peel else 168,
        max_shared_bytes=(160 if K >= 128 else 113) << 10,
    )


CASES = [case(layout, K) for layout in LAYOUTS for K in (8, 32, 64, 128, 256)]
CASES += [case("tokens", 63, ones=True), case("tokens", 63, atomic=True)]
CASES += [case("tokens", K, T=25084) for K in (16, 64)]
CASES += [case(layout, K, bits=bits) for layout in ("tokens", "nchw14") for K in (8, 64) for bits in (4, 8)]
CASES += [case("tokens", 128, bits=4), case("tokens", 128, bits=8), case("nchw14", 128, bits=8)]
