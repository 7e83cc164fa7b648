"""Second pass of a two-pass reduction: sum the partial results of all splits in a fixed order.

S splits, n elements of each of R x S kernel taps (one tap where there is no kernel).
"""

from __future__ import annotations

import torch

from trady_triton.ops.dispatch import jit, launch, tl, use_triton
from trady_triton.ops.library import register_op
from trady_triton.ops.select_config import Arch, Config, Shape, rule, select_config


@jit(do_not_specialize=["S"])
def _splitk_reduce_kernel(
    partials_ptr, out_ptr, n, S, TAPS: tl.constexpr, ACCUMULATE: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr
):  # partials [S, TAPS, n] -> out [n, TAPS]
    offs = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    tap = tl.program_id(1)
    inside = offs < n
    out = out_ptr + offs * TAPS + tap
    acc = tl.zeros([BS, BN], tl.float32)
    for s0 in range(0, S, BS):
        s = s0 + tl.arange(0, BS)
        tile = partials_ptr + (s.to(tl.int64) * TAPS + tap)[:, None] * n + offs[None, :]
        acc += tl.load(tile, mask=(s < S)[:, None] & inside[None, :], other=0.0)
    total = tl.sum(acc, axis=0)
    if ACCUMULATE:
        total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def splitk_reduce_ref_(out: torch.Tensor, partials: torch.Tensor, accumulate: bool = False) -> torch.Tensor:
    """What `splitk_reduce_` computes, in torch."""
    total = partials.sum(0).view(out.shape)
    return out.copy_(out.float() + total if accumulate else total)


@rule("splitk_reduce")
def _rule(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    """Few elements: spread one element's splits over many rows, so that enough programs and loads are in flight."""
    few = shape["n"] * shape["TAPS"] < 64 * 4 * arch.num_sms
    meta = {"BS": 32, "BN": 64} if few else {"BS": 4, "BN": 512}
    return Config(meta, num_warps=4, num_stages=2)


def splitk_reduce_launch(
    out: torch.Tensor, partials: torch.Tensor, accumulate: bool = False, taps: int = 1
) -> torch.Tensor:
    """The kernel of `splitk_reduce_`, for callers that are inside an op already: no dispatch, no checks.

    Of more than one tap the partials are [S, taps, n] and out is [n, taps].
    """
    n, S = out.numel() // taps, partials.shape[0]
    if n:
        config = select_config("splitk_reduce", {"n": n, "S": S, "TAPS": taps}, out.dtype, Arch.of(out.device))
        grid = (-(-n // config.meta["BN"]), taps)
        launch(_splitk_reduce_kernel, grid, partials, out, n, S, config=config, TAPS=taps, ACCUMULATE=accumulate)
    return out


def _impl(out: torch.Tensor, partials: torch.Tensor, accumulate: bool) -> None:
    if use_triton(out):
        splitk_reduce_launch(out, partials, accumulate)
    else:
        splitk_reduce_ref_(out, partials, accumulate)


def _fake(out: torch.Tensor, partials: torch.Tensor, accumulate: bool) -> None:
    return None


_op = register_op("splitk_reduce_(Tensor(a!) out, Tensor partials, bool accumulate) -> ()", _impl, _fake)


def splitk_reduce_(out: torch.Tensor, partials: torch.Tensor, accumulate: bool = False) -> torch.Tensor:
    """Write (or add, with `accumulate`) the sum over partials [S, n] fp32 into contiguous out [...] of n elements.

    The order of the sum depends only on (S, n, device kind), so the result is the same bit for bit on every run.
    Raises: ValueError for partials of another dtype or shape, or an out that is not contiguous.
    """
    if partials.dtype != torch.float32 or partials.dim() != 2 or not partials.is_contiguous():
        raise ValueError(
            f"partials: got {partials.dtype} {tuple(partials.shape)} with strides {partials.stride()}, "
            "wanted contiguous float32 [S, n]"
        )
    if partials.shape[1] != out.numel() or not out.is_contiguous():
        raise ValueError(f"out: got {tuple(out.shape)}, wanted {partials.shape[1]} contiguous elements")
    _op(out, partials, accumulate)
    return out


def splitk_reduce_bytes(S: int, n: int, itemsize: int, accumulate: bool = False) -> int:
    """Bytes that a perfect reduction moves: the partials read, the result written (and read to accumulate)."""
    return 4 * S * n + itemsize * n * (2 if accumulate else 1)
