"""Activation forward that keeps its derivative in 1, 8 or 2 bits an element, and the backward that reads it.

n elements; `code` is uint8 [ceil(n * bits / 8)]: element i of the STORAGE order of y owns the bits from (i * bits) %
8 up in byte i * bits // 8. y is dense in the memory format of x, so channels_last needs no copy; the backward takes
y's strides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite

import torch

from trady_triton.ops.activation import EXACT, SMOOTH, activate, activate_into, bounds, derivative_ref
from trady_triton.ops.bits import pack, pack_bits, spread_bits
from trady_triton.ops.dispatch import jit, launch, tl, use_triton
from trady_triton.ops.library import register_op
from trady_triton.ops.philox import random16, random16_ref
from trady_triton.ops.select_config import Arch, Config, Shape, rule, select_config

_CHUNK = 1 << 19


@jit
def derivative_code(
    d, noise, ZERO: tl.constexpr, SCALE: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """int32 code of a derivative; noise in [0, 1) rounds the 8-bit code (1/2: to nearest)."""
    if BITS == 1:
        return d.to(tl.int32)
    elif BITS == 2:
        return (d > T0).to(tl.int32) + (d > T1).to(tl.int32) + (d > T2).to(tl.int32)
    else:
        return tl.minimum(tl.maximum(tl.floor(d * SCALE + (noise + ZERO)), 0.0), 255.0).to(tl.int32)


@jit(do_not_specialize=["low", "high"])
def _pack_kernel(
    x_ptr, y_ptr, code_ptr, seed_ptr, n, low, high,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, SCALE: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 8 // BITS
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    y, d = activate(x.to(tl.float32), low, high, KIND)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)
    noise = 0.5
    if seed_ptr is not None:
        counter = (start // 8).to(tl.int32) + tl.arange(0, BLOCK // 8)
        noise = tl.reshape(random16(tl.load(seed_ptr), counter, 0, 0, 0), [BLOCK]).to(tl.float32) * 1.52587890625e-05
    code = derivative_code(d, noise, ZERO, SCALE, T0, T1, T2, BITS)
    if PER > 1:
        code = tl.where(offs < n, code, 0)
        code = tl.sum(tl.reshape(code, [BLOCK // PER, PER]) << (tl.arange(0, PER) * BITS)[None, :], axis=1)
    byte = start // PER + tl.arange(0, BLOCK // PER)
    tl.store(code_ptr + byte, code.to(tl.uint8), mask=byte * PER < n)


@jit(do_not_specialize=["slope"])
def _unpack_kernel(
    dy_ptr, code_ptr, dx_ptr, n, slope,
    BITS: tl.constexpr, ZERO: tl.constexpr, SCALE: tl.constexpr, L0: tl.constexpr, L1: tl.constexpr, L2: tl.constexpr,
    L3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 8 // BITS
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    code = tl.load(code_ptr + offs // PER, mask=offs < n, other=0).to(tl.int32)
    if BITS == 1:
        dx = tl.where((code >> (offs % 8).to(tl.int32)) & 1 != 0, dy * slope, 0.0)
    elif BITS == 2:
        code = (code >> (offs % 4 * 2).to(tl.int32)) & 3
        dx = dy * tl.where(code < 2, tl.where(code == 0, L0, L1), tl.where(code == 2, L2, L3))
    else:
        dx = dy * ((code - ZERO).to(tl.float32) / SCALE)
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=offs < n)


def has_kernel(x: torch.Tensor) -> bool:
    """Whether the kernels run for x: not for fp64, as a launch passes the limits of an activation in fp32."""
    return x.dtype != torch.float64 and use_triton(x)


def dense_stride(x: torch.Tensor) -> tuple[int, ...]:
    """The strides of empty_like(x): those of x where it is dense."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):  # no tensor is made
        return x.stride()
    return torch.empty_like(x, device="meta").stride()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor as [n] in storage order."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _in_layout(tensor: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    if tensor.stride() == tuple(stride):
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _chunks(n: int) -> Iterator[slice]:
    """Slices of n elements whose temporaries stay in a CPU cache, and off the peak of memory."""
    return (slice(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK))


def code_bytes(num_elements: int, bits: int) -> int:
    """Bytes that the packed derivative of so many elements takes."""
    return (num_elements * bits + 7) // 8


def _exact_code(t: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Bits where t, clamped to [low, high], is neither; NaN is not.

    By casts of what is not 0, because torch's comparisons take four times as long on a CPU.
    """
    if low == 0:  # what lies between the limits is not 0, so it may stand for the gradient
        alive = (torch.ops.aten.hardtanh_backward(t, t, low, high) if isfinite(high) else t).to(torch.bool)
    elif isfinite(low):
        alive = (t - low).to(torch.bool)
        if isfinite(high):
            alive.logical_and_((high - t).to(torch.bool))
    else:
        alive = torch.le(t, low).logical_or_(t >= high).logical_not_()
    return pack_bits(alive)


def _smooth_code(x: torch.Tensor, kind: str, bits: int, seed: torch.Tensor | None, start: int) -> torch.Tensor:
    d, smooth, n = derivative_ref(x, kind), SMOOTH[kind], x.numel()
    if bits == 2:
        level = torch.zeros(4 * code_bytes(n, 2), dtype=torch.uint8, device=x.device)
        for threshold in smooth.thresholds:
            level[:n] += d > threshold
        return pack(level, 2)
    noise: float | torch.Tensor = 0.5
    if seed is not None:
        counter = start // 8 + torch.arange(-(-n // 8), device=x.device)
        noise = random16_ref(seed, counter, 0, 0, 0).flatten()[:n].to(d.dtype) / 65536
    return d.mul_(smooth.scale).add_(noise + smooth.zero).floor_().clamp_(0, 255).to(torch.uint8)


def act_pack_ref(
    x: torch.Tensor, kind: str, bits: int, low: float, high: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the op act_pack computes, in torch."""
    y = torch.empty_like(x)
    return y, _pack_into(_flat(_in_layout(x, y.stride())), _flat(y), kind, bits, (low, high), seed)


def _pack_into(
    x: torch.Tensor, y: torch.Tensor, kind: str, bits: int, limits: tuple[float, float], seed: torch.Tensor | None
) -> torch.Tensor:
    """Write the activation of x [n] to y [n], which may be x, and return the codes."""
    if x.numel() <= _CHUNK:
        return _pack_chunk(x, y, kind, bits, limits, seed, 0)
    code = torch.empty(code_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)
    for part in _chunks(x.numel()):
        packed = _pack_chunk(x[part], y[part], kind, bits, limits, seed, part.start)
        code[part.start * bits // 8 :][: packed.numel()] = packed
    return code


def _pack_chunk(
    x: torch.Tensor, y: torch.Tensor, kind: str, bits: int, limits: tuple[float, float], seed: torch.Tensor | None,
    start: int,
) -> torch.Tensor:  # fmt: skip
    """`_pack_into` of few elements, the first of which is element `start` of the whole."""
    if bits == 1:
        clamped = x.clamp(*limits) if kind == "hardsigmoid" else y
        activate_into(x, kind, *limits, y)
        return _exact_code(clamped, *limits)
    packed = _smooth_code(x, kind, bits, seed, start)
    activate_into(x, kind, *limits, y)
    return packed[: code_bytes(x.numel(), bits)]


def act_unpack_ref(dy: torch.Tensor, code: torch.Tensor, kind: str, bits: int, stride: Sequence[int]) -> torch.Tensor:
    """What `act_unpack` computes, in torch."""
    flat = _flat(_in_layout(dy, stride))
    dx = torch.empty_like(flat)
    for part in _chunks(dy.numel()):
        packed = code[part.start * bits // 8 : code_bytes(part.stop, bits)]
        _unpack_chunk(flat[part], packed, kind, bits, dx[part])
    return dx.as_strided(dy.shape, stride)


def _unpack_chunk(dy: torch.Tensor, code: torch.Tensor, kind: str, bits: int, dx: torch.Tensor) -> None:
    """Write dx [n] of dy [n]; where the derivative is a bit, NaN and inf do not pass a cleared one."""
    if bits == 1:
        dx.copy_(spread_bits(code)[: dy.numel()])
        torch.ops.aten.threshold_backward.grad_input(dy, dx, 0, grad_input=dx)  # far faster than torch.where on a CPU
        if EXACT[kind].slope != 1:
            dx.mul_(EXACT[kind].slope)
        return
    d = _derivative(code, kind, bits, torch.promote_types(dy.dtype, torch.float32))
    dx.copy_(d[: dy.numel()].mul_(dy))


def _derivative(code: torch.Tensor, kind: str, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The derivative that 8- or 2-bit codes stand for, one value for each code in them."""
    smooth = SMOOTH[kind]
    if bits == 8:
        return code.to(dtype).sub_(smooth.zero).div_(smooth.scale)
    byte = torch.arange(256, device=code.device)[:, None] >> torch.tensor([0, 2, 4, 6], device=code.device) & 3
    levels = torch.tensor(smooth.levels, dtype=dtype, device=code.device)
    return levels[byte].index_select(0, code.int()).flatten()


@rule("act_pack")
def _rule(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    """1024 elements a program keep erf and exp below the register limit of triton 3.6."""
    return Config({"BLOCK": 1024}, num_warps=4, num_stages=1)


def code_constants(kind: str, bits: int) -> dict[str, float]:
    """The constexprs of `derivative_code` for a kind."""
    smooth = SMOOTH.get(kind)
    thresholds = smooth.thresholds if smooth else (0.0, 0.0, 0.0)
    return {
        "BITS": bits,
        "ZERO": smooth.zero if smooth else 0,
        "SCALE": smooth.scale if smooth else 1,
        **{f"T{i}": threshold for i, threshold in enumerate(thresholds)},
    }


def _pack(
    x: torch.Tensor, kind: str, bits: int, low: float, high: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if not has_kernel(x):
        return act_pack_ref(x, kind, bits, low, high, seed)
    y = torch.empty_like(x)
    code = torch.empty(code_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)
    _launch_pack(_in_layout(x, y.stride()), y, code, kind, bits, low, high, seed)
    return y, code


def _launch_pack(
    x: torch.Tensor, y: torch.Tensor, code: torch.Tensor, kind: str, bits: int, low: float, high: float,
    seed: torch.Tensor | None,
) -> None:  # fmt: skip
    """x and y are dense in the same layout, or one."""
    if n := x.numel():
        config = select_config("act_pack", {"n": n}, x.dtype, Arch.of(x.device))
        grid = (-(-n // config.meta["BLOCK"]),)
        launch(_pack_kernel, grid, x, y, code, seed, n, low, high, config=config, KIND=kind,
               **code_constants(kind, bits))  # fmt: skip


def _pack_(x: torch.Tensor, kind: str, bits: int, low: float, high: float, seed: torch.Tensor | None) -> torch.Tensor:
    if x.stride() != dense_stride(x):
        y, code = _pack(x, kind, bits, low, high, seed)
        x.copy_(y)
        return code
    if not has_kernel(x):
        return _pack_into(_flat(x), _flat(x), kind, bits, (low, high), seed)
    code = torch.empty(code_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)
    _launch_pack(x, x, code, kind, bits, low, high, seed)
    return code


def _unpack(dy: torch.Tensor, code: torch.Tensor, kind: str, bits: int, stride: Sequence[int]) -> torch.Tensor:
    if not has_kernel(dy):
        return act_unpack_ref(dy, code, kind, bits, stride)
    dx, n = torch.empty_strided(dy.shape, stride, dtype=dy.dtype, device=dy.device), dy.numel()
    if n:
        constants = {key: value for key, value in code_constants(kind, bits).items() if not key.startswith("T")}
        levels = SMOOTH[kind].levels if kind in SMOOTH else (0.0,) * 4
        constants |= {f"L{i}": level for i, level in enumerate(levels)}
        config = select_config("act_pack", {"n": n}, dy.dtype, Arch.of(dy.device))
        slope = EXACT[kind].slope if kind in EXACT else 1.0
        launch(_unpack_kernel, (-(-n // config.meta["BLOCK"]),), _in_layout(dy, stride), code, dx, n, slope,
               config=config, **constants)  # fmt: skip
    return dx


def _fake_pack(
    x: torch.Tensor, kind: str, bits: int, low: float, high: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(code_bytes(x.numel(), bits), dtype=torch.uint8)


def _fake_pack_(
    x: torch.Tensor, kind: str, bits: int, low: float, high: float, seed: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(code_bytes(x.numel(), bits), dtype=torch.uint8)


def _fake_unpack(dy: torch.Tensor, code: torch.Tensor, kind: str, bits: int, stride: Sequence[int]) -> torch.Tensor:
    return dy.new_empty_strided(dy.shape, stride)


_pack_op = register_op(
    "act_pack(Tensor x, str kind, int bits, float low, float high, Tensor? seed) -> (Tensor, Tensor)", _pack, _fake_pack
)
_pack_in_place_op = register_op(
    "act_pack_(Tensor(a!) x, str kind, int bits, float low, float high, Tensor? seed) -> Tensor", _pack_, _fake_pack_
)
_unpack_op = register_op(
    "act_unpack(Tensor dy, Tensor code, str kind, int bits, SymInt[] stride) -> Tensor", _unpack, _fake_unpack
)


def act_pack(
    x: torch.Tensor, kind: str, bits: int, low: float | None = None, high: float | None = None,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(y, code) of a floating x of any shape and layout.

    kind: a key of activation.EXACT (1 bit) or activation.SMOOTH (8 or 2 bits).
    low, high: the bounds of hardtanh.   seed: int64 of one element; rounds 8-bit codes stochastically (unbiased).
    Raises: ValueError for an unknown kind, or bits or a seed that the kind does not take.
    """
    lower, upper = bounds(kind, low, high)
    check_bits(kind, bits, seed)
    y, code = _pack_op(x, kind, bits, lower, upper, seed)
    return y, code


def act_pack_(
    x: torch.Tensor, kind: str, bits: int, low: float | None = None, high: float | None = None,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The code alone; x becomes its activation. Otherwise as `act_pack`."""
    lower, upper = bounds(kind, low, high)
    check_bits(kind, bits, seed)
    code: torch.Tensor = _pack_in_place_op(x, kind, bits, lower, upper, seed)
    return code


def act_unpack(dy: torch.Tensor, code: torch.Tensor, kind: str, bits: int, stride: Sequence[int]) -> torch.Tensor:
    """dx = dy * derivative, in the layout `stride` of the y that `act_pack` returned; dy may have any layout."""
    dx: torch.Tensor = _unpack_op(dy, code, kind, bits, stride)
    return dx


def check_bits(kind: str, bits: int, seed: torch.Tensor | None) -> None:
    """Raises: ValueError when a kind has no such code."""
    if bits not in ((1,) if kind in EXACT else (8, 2)):
        raise ValueError(f"activation {kind!r}: got {bits} bits, wanted {'1' if kind in EXACT else '8 or 2'}")
    if seed is not None and bits != 8:
        raise ValueError(f"activation {kind!r}: {bits}-bit codes are not rounded, so they take no seed")


def pack_bytes(num_elements: int, itemsize: int, bits: int) -> int:
    """Bytes that the forward moves (x read, y and code written) and, with dy and dx, the backward too."""
    return 2 * num_elements * itemsize + code_bytes(num_elements, bits)
