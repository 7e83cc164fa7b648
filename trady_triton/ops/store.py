"""Compact activation store: copy the selected input channels into the layout that the weight-gradient kernels read.

N images, C channels, K selected channels, H x W pixels (P x Q kept by the stride), T tokens or kept pixels, Kp = K rounded up to 8.

| layout   | input x      | store                                                | read by                          |
|----------|--------------|------------------------------------------------------|----------------------------------|
| "tokens" | [..., C]     | CM [K, T], T = product of the leading sizes          | token_wgrad (Linear)             |
| "pixels" | [N, C, H, W] | CM [K, T], T = N P Q in (n, p, q) order              | token_wgrad (1x1 conv)           |
| "taps"   | [N, C, H, W] | PM [N, H, W, Kp], channels K..Kp-1 are zero          | conv_wgrad (R S > 1, groups = 1) |
| "planes" | [N, C, H, W] | CN [K, N, H, W]                                      | grouped and depthwise wgrad      |

CM rows have a stride of T rounded up to 8, so that every row starts aligned; what lies between two rows is never read.
"""

import torch

from trady_triton.ops.dispatch import tl, triton

LAYOUTS = ("tokens", "pixels", "taps", "planes")


@triton.jit(do_not_specialize=["T", "K", "ROWS", "so"])
def _store_kernel(
    x_ptr, channels_ptr, out_ptr, T, K, ROWS, so, sn, sp, sq, sc,
    PQ: tl.constexpr, Q: tl.constexpr, UNIT: tl.constexpr, PIXEL_MAJOR: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    # out row stride is so * UNIT: with UNIT = 8 the compiler knows that rows are aligned though so is not specialised
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    j = tl.program_id(1).to(tl.int64) * BJ + tl.arange(0, BJ)
    channel = tl.load(channels_ptr + j, mask=j < K, other=0).to(tl.int64)
    pixel = t % PQ
    token = t // PQ * sn + pixel // Q * sp + pixel % Q * sq
    keep = (j < K)[:, None] & (t < T)[None, :]
    x = tl.load(x_ptr + channel[:, None] * sc + token[None, :], mask=keep, other=0.0)  # [BJ, BT]
    inside = (j < ROWS)[:, None] & (t < T)[None, :]
    if PIXEL_MAJOR:
        tl.store(out_ptr + t[None, :] * (so * UNIT) + j[:, None], x, mask=inside)
    else:
        tl.store(out_ptr + j[:, None] * (so * UNIT) + t[None, :], x, mask=inside)


def padded(size: int, multiple: int = 8) -> int:
    """`size` rounded up to a multiple."""
    return (size + multiple - 1) // multiple * multiple


def kept_pixels(x: torch.Tensor, stride: Sequence[int]) -> tuple[int, int]:
    """(P, Q): how many rows and columns of x [N, C, H, W] a strided 1x1 convolution reads."""
    return (x.shape[2] + stride[0] - 1) // stride[0], (x.shape[3] + stride[1] - 1) // stride[1]


def _empty_store(x: torch.Tensor, K: int, layout: str, stride: Sequence[int]) -> torch.Tensor:
    if layout == "taps":
        return x.new_empty(x.shape[0], x.shape[2], x.shape[3], padded(K))
    if layout == "planes":
        return x.new_empty(K, x.shape[0], x.shape[2], x.shape[3])
    T = math.prod(x.shape[:-1]) if layout == "tokens" else x.shape[0] * math.prod(kept_pixels(x, stride))
    return x.new_empty_strided((K, T), (padded(T), 1))


def store_channels_ref(x: torch.Tensor, channels: torch.Tensor, layout: str, stride: Sequence[int] = (1, 1)) -> torch.Tensor:
    """What `store_channels` computes, in torch."""
    K = channels.numel()
    store = _empty_store(x, K, layout, stride)
    if layout == "tokens":
        return store.copy_(x.index_select(-1, channels).reshape(-1, K).t())
    picked = x[:, :, :: stride[0], :: stride[1]].index_select(1, channels)  # [N, K, P, Q]
    if layout == "taps":
        store[..., K:].zero_()
        store[..., :K].copy_(picked.permute(0, 2, 3, 1))
    elif layout == "pixels":
        store.unflatten(1, (picked.shape[0], *picked.shape[2:])).copy_(picked.transpose(0, 1))
    else:
        store.copy_(picked.transpose(0, 1))
    return store


def source_strides(x: torch.Tensor, layout: str, stride: Sequence[int]) -> tuple[int, int, int, int, int, int]:
    """(PQ, Q, sn, sp, sq, sc) so that token t of channel c lies at t // PQ * sn + t % PQ // Q * sp + t % Q * sq + c * sc.

    Sizes that lie behind one another in memory are merged, so that the kernel divides as little as it can.
    """
    if layout == "tokens":
        flat = x.view(-1, x.shape[-1])
        return 1, 1, flat.stride(0), 0, 0, flat.stride(1)
    (P, Q), (sn, sc, sp, sq) = kept_pixels(x, stride), x.stride()
    sp, sq = sp * stride[0], sq * stride[1]
    if P == 1 or sp == Q * sq:
        P, Q = 1, P * Q
        if sn == Q * sq:
            return 1, 1, sq, 0, 0, sc
    return P * Q, Q, sn, sp, sq, sc
