"""Helpers that run inside kernels."""

from __future__ import annotations

import torch

from trady_triton.ops.dispatch import jit, tl


@jit
def tile_dot(a, b, acc, PREC: tl.constexpr, UP: tl.constexpr):
    """acc + a @ b; UP (dispatch.INTERPRET) upcasts both operands, because the interpreter multiplies raw bf16 bits."""
    if UP:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PREC)


@jit
def load_tokens(
    ptr, t, c, T, O, image, pixel, PQ: tl.constexpr, CHANNEL: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr
):
    """Tile [tokens, channels] of a tensor whose layout is (image, pixel, PQ, CHANNEL), zero outside [T, O]."""
    if WIDE:
        t = t.to(tl.int64)
        c = c.to(tl.int64)
    if PQ == 1:
        token = t * image
    else:
        token = t // PQ * image + t % PQ * pixel
    keep = (c < O)[None, :]
    if MASKED:
        keep = keep & (t < T)[:, None]
    return tl.load(ptr + token[:, None] + (c * CHANNEL)[None, :], mask=keep, other=0.0)


def dot_precision(dtype: torch.dtype) -> str:
    """The PREC of a dot over `dtype` operands: fp32 follows what torch's own products on CUDA do, others are exact.

    torch.set_float32_matmul_precision() sets it too; its getter raises where somebody has used the newer name.
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
