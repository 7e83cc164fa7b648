"""Weight gradient of the selected input channels of a Linear or 1x1 convolution.

T tokens or kept pixels, K selected channels, O out, S splits of T.   store [K, T], dy [..., O] or [N, O, P, Q].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .dispatch import INTERPRET, backend, deterministic, jit, launch, tl, use_triton
from .library import register_op
from .select_config import MAX_WORKSPACE_BYTES, Arch, Config, Shape, next_power_of_2, rule, select_config
from .splitk_reduce import splitk_reduce_launch
from .tile import dot_precision, tile_dot
from .token_layout import TokenLayout, as_batches, token_layout
from .workspace import workspace


@jit
def _load_dy(
    dy_ptr, t, c, T, O, image, pixel, PQ: tl.constexpr, CHANNEL: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr
):  # -> [tokens, BN]
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
    return tl.load(dy_ptr + token[:, None] + (c * CHANNEL)[None, :], mask=keep, other=0.0)


@jit
def _load_x(x_ptr, row, keep_row, t, T, UP: tl.constexpr, MASKED: tl.constexpr):  # -> [BM, tokens]
    keep = keep_row[:, None]
    if MASKED:
        keep = keep & (t < T)[None, :]
    x = tl.load(x_ptr + row[:, None] + t[None, :], mask=keep, other=0.0)
    return x.to(tl.float32) if UP else x


@jit
def _accumulate(
    acc, x_ptr, dy_ptr, row, j, c, t0, T, O, K, image, pixel,
    PQ: tl.constexpr, CHANNEL: tl.constexpr, WIDE: tl.constexpr, ONES: tl.constexpr, MASKED: tl.constexpr,
    BK: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    t = t0 + tl.arange(0, BK)
    dy = _load_dy(dy_ptr, t, c, T, O, image, pixel, PQ, CHANNEL, WIDE, MASKED)
    x = _load_x(x_ptr, row, j < K, t, T, UP, MASKED)
    if ONES:
        x = tl.where((j == K)[:, None], 1.0, x).to(x.dtype)
    return tile_dot(x, dy, acc, PREC, UP)


@jit(do_not_specialize=["K", "row_units", "blocks_per_split"])
def _token_wgrad_kernel(
    x_ptr, dy_ptr, out_ptr, T, O, K, row_units, image, pixel, blocks_per_split,
    PQ: tl.constexpr, CHANNEL: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, ONES: tl.constexpr,
    PEEL: tl.constexpr, ATOMIC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    # out [S, M, O]; M = K, or K + 1 with ONES: a row of ones below the store makes row K the bias gradient
    M = K + 1 if ONES else K
    tiles_m = tl.cdiv(M, BM)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    j = tile % tiles_m * BM + tl.arange(0, BM)
    c = tile // tiles_m * BN + tl.arange(0, BN)
    # a row stride given in units of 8 tells the compiler that rows are aligned, although K and T may be anything
    row = (j.to(tl.int64) if WIDE else j) * (row_units * UNIT)
    begin = split * blocks_per_split * BK
    end = tl.minimum(begin + blocks_per_split * BK, T)
    # Masks by a T that is no multiple of 16 would make every load scalar: there only the last tile gets one (PEEL).
    full = tl.maximum(tl.minimum(end, T // BK * BK), begin) if PEEL else end
    acc = tl.zeros([BM, BN], tl.float32)
    for t0 in range(begin, full, BK):
        acc = _accumulate(acc, x_ptr, dy_ptr, row, j, c, t0, T, O, K, image, pixel,
                          PQ, CHANNEL, WIDE, ONES, not PEEL, BK, PREC, UP)  # fmt: skip
    if PEEL:
        for t0 in tl.range(full, end, BK, num_stages=1):
            acc = _accumulate(acc, x_ptr, dy_ptr, row, j, c, t0, T, O, K, image, pixel,
                              PQ, CHANNEL, WIDE, ONES, True, BK, PREC, UP)  # fmt: skip
    first = 0 if ATOMIC else split.to(tl.int64) * M
    out = out_ptr + (first + j)[:, None] * O + c[None, :]
    inside = (j < M)[:, None] & (c < O)[None, :]
    if ATOMIC:
        tl.atomic_add(out, acc, mask=inside, sem="relaxed")
    else:
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


def _part_size(x: torch.Tensor, O: int, upcast: bool) -> int:
    """How many tokens (one batch) or batches to multiply at once, so that temporaries stay within 8 MiB."""
    N, K, PQ = x.shape
    if N == 1:
        return max(1, MAX_WORKSPACE_BYTES // (4 * (K + O))) if upcast else PQ
    return max(1, MAX_WORKSPACE_BYTES // (4 * (K * O + (PQ * (K + O) if upcast else 0))))


def _parts(x: torch.Tensor, dy: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Slices of x [N, K, PQ] and dy [N, PQ, O]: `size` tokens of the one batch, or `size` batches."""
    x_dim, dy_dim = (2, 1) if x.shape[0] == 1 else (0, 0)
    return zip(x.split(size, x_dim), dy.split(size, dy_dim), strict=True)


def _product(x: torch.Tensor, dy: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum over batches of x [N, K, PQ] times dy [N, PQ, O], accumulated and returned in `dtype`."""
    if x.dtype == dtype:
        return torch.bmm(x, dy).sum(0)
    if x.is_cuda:
        return torch.bmm(x, dy, out_dtype=dtype).sum(0)
    return torch.bmm(x.to(dtype), dy.to(dtype)).sum(0)


def token_wgrad_ref(
    store: torch.Tensor,
    dy: torch.Tensor,
    channel_dim: int = -1,
    *,
    out_dtype: torch.dtype = torch.float32,
    deterministic: bool = True,
    ones_row: bool = False,
) -> torch.Tensor:
    """What `token_wgrad` computes, by matrix products of torch (cuBLAS on a GPU) over views of dy."""
    dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    batches = as_batches(dy, channel_dim)
    x = store.unflatten(1, batches.shape[:2]).transpose(0, 1)
    out = torch.zeros(store.shape[0], batches.shape[2], dtype=dtype, device=dy.device)
    if out.numel() and store.shape[1]:
        size = _part_size(x, batches.shape[2], upcast=dy.dtype != dtype and not dy.is_cuda)
        for x_part, dy_part in _parts(x, batches, size):
            out += _product(x_part, dy_part, dtype)
    if ones_row:
        out = torch.cat([out, batches.sum((0, 1), dtype=dtype)[None]])
    return out.to(out_dtype)


def _tiles(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    planes = shape["PQ"] > 1
    BM = min(max(next_power_of_2(shape["K"]), 16), 256)
    narrow = BM == 256 or (planes and (BM == 16 or shape["PQ"] % 4 != 0))  # wider ones need too many registers
    BN = min(max(next_power_of_2(shape["O"]), 32), 64 if narrow else 128)
    BK = 32 if dtype == torch.float32 else 64
    stages = 2 if arch.hip else 3 if BM >= 128 or dtype == torch.float32 else 4
    return Config({"BM": BM, "BN": BN, "BK": BK}, num_warps=8 if BM * BN >= 16384 else 4, num_stages=stages)


@rule("token_wgrad")
def _rule(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    """One pass over dy where K allows it; as many splits of T as fill the device once, for little more traffic.

    More than 256 channels are bound by arithmetic, and fp32 has no fast transposed operand: cuBLAS is better there.
    """
    tiles = _tiles(shape, dtype, arch)
    T, O, K = shape["T"], shape["O"], shape["K"]
    BM, BN, BK = (tiles.meta[name] for name in ("BM", "BN", "BK"))
    programs = -(-K // BM) * -(-O // BN)
    waves = 2 if BM <= 64 else 1
    most = (
        waves * arch.num_sms // programs,
        T // (4 * BK),
        MAX_WORKSPACE_BYTES // (4 * K * O),
        T * dtype.itemsize // (16 * K),  # partials written and read again: at most half of the bytes of dy
    )
    mm = K > 256 or dtype == torch.float32
    return replace(tiles, split=max(1, min(most)), backend="mm" if mm else "triton")


def _out_of_int32(*tensors: torch.Tensor) -> bool:
    return any(
        sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31 for x in tensors
    )


def _launch(store: torch.Tensor, dy: torch.Tensor, layout: TokenLayout, out: torch.Tensor, config: Config) -> None:
    """Fill out: [S, M, O] partials or the [M, O] result; fp32 partials are added where `config` asks for atomics."""
    K, T = store.shape
    BM, BN, BK = (config.meta[name] for name in ("BM", "BN", "BK"))
    M = out.shape[-2]
    blocks = -(-T // BK)
    split = config.split
    unit = 8 if store.stride(0) % 8 == 0 else 1
    launch(
        _token_wgrad_kernel, (-(-M // BM) * -(-layout.O // BN), split),
        store, dy, out, T, layout.O, K, store.stride(0) // unit, layout.image, layout.pixel, -(-blocks // split),
        config=config, PQ=layout.PQ, CHANNEL=layout.channel, UNIT=unit, WIDE=_out_of_int32(store, dy), ONES=M > K,
        PEEL=T % 16 != 0, ATOMIC=out.dim() == 2 and split > 1, PREC=dot_precision(store.dtype), UP=INTERPRET,
    )  # fmt: skip


def _two_pass(
    store: torch.Tensor, dy: torch.Tensor, layout: TokenLayout, out: torch.Tensor, config: Config
) -> torch.Tensor:
    partials = workspace(dy.device, config.split * out.numel()).view(config.split, *out.shape)
    _launch(store, dy, layout, partials, config)
    return splitk_reduce_launch(out, partials.flatten(1))


def _impl(
    store: torch.Tensor, dy: torch.Tensor, channel_dim: int, out_dtype: torch.dtype, two_pass: bool, ones_row: bool
) -> torch.Tensor:
    M = store.shape[0] + ones_row
    if M == 0 or dy.numel() == 0 or store.dtype == torch.float64 or not use_triton(store):
        return token_wgrad_ref(store, dy, channel_dim, out_dtype=out_dtype, ones_row=ones_row)
    layout = token_layout(dy, channel_dim)
    if layout is None:
        return _impl(store, dy.contiguous(), channel_dim, out_dtype, two_pass, ones_row)
    shape = {"T": layout.T, "O": layout.O, "K": M, "PQ": layout.PQ}
    config = select_config("token_wgrad", shape, store.dtype, Arch.of(store.device))
    if config.backend == "mm" and backend() != "triton":
        return token_wgrad_ref(store, dy, channel_dim, out_dtype=out_dtype, ones_row=ones_row)
    out = torch.empty(M, layout.O, dtype=out_dtype, device=dy.device)
    if config.split == 1:
        _launch(store, dy, layout, out, config)
        return out
    if two_pass or deterministic(False):
        return _two_pass(store, dy, layout, out, config)
    added = torch.zeros(M, layout.O, dtype=torch.float32, device=dy.device)
    _launch(store, dy, layout, added, config)
    return added.to(out_dtype)


def _fake(
    store: torch.Tensor, dy: torch.Tensor, channel_dim: int, out_dtype: torch.dtype, two_pass: bool, ones_row: bool
) -> torch.Tensor:
    return dy.new_empty(store.shape[0] + ones_row, dy.shape[channel_dim], dtype=out_dtype)


def token_wgrad_flops(
    store_shape: torch.Size, dy_shape: torch.Size, channel_dim: int, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """2 T K O."""
    return 2 * store_shape[0] * store_shape[1] * dy_shape[channel_dim]


def token_wgrad_bytes(T: int, O: int, K: int, itemsize: int, out_itemsize: int = 4) -> int:
    """Bytes that a perfect kernel moves: the store and dy read once, the result written."""
    return itemsize * T * (K + O) + out_itemsize * K * O


_op = register_op(
    "token_wgrad(Tensor store, Tensor dy, int channel_dim, ScalarType out_dtype, bool two_pass, bool ones_row)"
    " -> Tensor",
    _impl,
    _fake,
    token_wgrad_flops,
)


def token_wgrad(
    store: torch.Tensor,
    dy: torch.Tensor,
    channel_dim: int = -1,
    *,
    out_dtype: torch.dtype = torch.float32,
    deterministic: bool = True,
    ones_row: bool = False,
) -> torch.Tensor:
    """Compact weight gradient store @ dy over tokens: [K, O] in `out_dtype`, accumulated in fp32.

    store: [K, T] of dy's dtype, rows at any stride; dy: [..., O] with `channel_dim` -1, or [N, O, P, Q] in any memory
    format with `channel_dim` 1; dy is read in place. `ones_row` appends the bias gradient as row K for no extra read
    of dy. Repeatable bit for bit, unless `deterministic` is False: then splits are added by atomics.
    Raises: ValueError for sizes, dtypes or a channel_dim that do not fit.
    """
    if channel_dim not in (-1, 1):
        raise ValueError(f"channel_dim: got {channel_dim}, wanted -1 ([..., O]) or 1 ([N, O, P, Q])")
    O = dy.shape[channel_dim]
    if store.dim() != 2 or store.shape[1] * O != dy.numel():
        raise ValueError(f"store: got {tuple(store.shape)}, wanted [K, T] with the tokens of dy {tuple(dy.shape)}")
    if store.dtype != dy.dtype or (store.shape[1] > 1 and store.stride(1) != 1):
        raise ValueError(f"store: got {store.dtype}, strides {store.stride()}, wanted {dy.dtype}, unit last stride")
    out: torch.Tensor = _op(store, dy, channel_dim, out_dtype, deterministic, ones_row)
    return out
