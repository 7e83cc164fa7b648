"""Registers the ops of this folder in the torch.library namespace `trady`, the cheap way (define/impl, no decorator).

    token_wgrad_op = register_op(
        "token_wgrad(Tensor x, Tensor dy, ScalarType out_dtype) -> Tensor",   # mutable arguments: Tensor(a!)
        impl=_impl,      # runs on the CPU and on CUDA/HIP; asks dispatch.use_triton itself
        fake=_fake,      # shapes and dtypes only
        flops=flops,     # (*shapes and scalars, out_shape=...) -> int, as torch.utils.flop_counter wants it
    )

The returned object is torch.ops.trady.token_wgrad.default; the public function of the file calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("trady", "DEF")


def register_op(
    schema: str, impl: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int] | None = None
) -> Any:
    """Define `schema` in the namespace trady with one implementation for CPU and CUDA, a fake and a FLOP formula."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, impl, key)
    torch.library.register_fake(f"trady::{name}", fake, lib=LIBRARY)
    packet = getattr(torch.ops.trady, name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    return packet.default
