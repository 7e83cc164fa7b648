"""Shipped configs of splitk_reduce: few and many elements, of one tap and of 3 x 3."""

import torch
from harness import Case

from trady_triton.ops.select_config import Arch, select_config
from trady_triton.ops.splitk_reduce import _splitk_reduce_kernel


def case(n, accumulate=False, taps=1):
    config = select_config("splitk_reduce", {"n": n, "S": 32, "TAPS": taps}, torch.float32, Arch("sm_90"))
    return Case(
        f"splitk_reduce {config.meta['BS']}x{config.meta['BN']}"
        + " accumulate" * accumulate
        + f" {taps} taps" * (taps > 1),
        _splitk_reduce_kernel,
        {"partials_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32", "S": "i32"},
        {"TAPS": taps, "ACCUMULATE": accumulate, **config.meta},
        aligned=("partials_ptr", "out_ptr", "n"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        ci=not accumulate and n > 1000 and taps == 1,
    )


CASES = [case(n, accumulate) for n in (1000, 1_000_000) for accumulate in (False, True)]
CASES += [case(n, taps=9) for n in (512, 65536)]
