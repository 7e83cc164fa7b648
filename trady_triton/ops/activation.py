"""The activations whose derivative can be packed: value, derivative and the codes for it, in Triton and in torch.

Exact kinds keep 1 bit, inside or outside (low, high): relu, relu6, hardtanh, hardsigmoid; the derivative is bit *
slope. Smooth kinds keep 8 bits, derivative = (code - zero) / scale, where 0 and 1 are codes, so that dead and
saturated elements stay exact; or, when asked, 2 bits: the nearest of four levels, which is another derivative (the
levels minimise the squared error for a standard normal input, as Lloyd and Max do; compare ReGELU2, arXiv
2406.16282).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trady_triton.ops.dispatch import jit, tl


@dataclass(frozen=True)
class Exact:
    """A piecewise linear activation: derivative `slope` inside (low, high), 0 outside."""

    low: float
    high: float
    slope: float = 1.0


@dataclass(frozen=True)
class Smooth:
    """8-bit grid (code - zero) / scale over the derivative's range, which is symmetric about 1/2, and 2-bit levels."""

    zero: int
    levels: tuple[float, float, float, float]

    @property
    def scale(self) -> int:
        """Codes between derivative 0 and 1."""
        return 255 - 2 * self.zero

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Midway between the levels."""
        return tuple((low + high) / 2 for low, high in zip(self.levels, self.levels[1:], strict=False))


EXACT = {
    "relu": Exact(0.0, float("inf")),
    "relu6": Exact(0.0, 6.0),
    "hardtanh": Exact(-1.0, 1.0),
    "hardsigmoid": Exact(-3.0, 3.0, 0.1666666716337204),  # 1/6 rounded to float32, as torch has it in every dtype
}
SMOOTH = {  # derivative ranges: GELU [-0.1290, 1.1290], SiLU [-0.0999, 1.0999], Hardswish [-0.5, 1.5]
    "gelu": Smooth(27, (-0.0463, 0.3129, 0.6876, 1.0465)),
    "gelu_tanh": Smooth(27, (-0.0463, 0.3129, 0.6876, 1.0464)),
    "silu": Smooth(22, (0.0335, 0.3445, 0.6556, 0.9665)),
    "hardswish": Smooth(64, (0.0061, 0.3515, 0.6487, 0.9939)),
}


@jit
def activate(x, low, high, KIND: tl.constexpr):
    """(activation, derivative) of fp32 x; an exact kind has derivative 1 inside, 0 outside; NaN is inside."""
    if KIND == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return x * gate, gate + x * gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == "silu":
        gate = tl.sigmoid(x)
        return x * gate, gate + x * gate * (1.0 - gate)
    elif KIND == "hardswish":
        slope = tl.where(x >= 3.0, 1.0, tl.where(x <= -3.0, 0.0, x * 0.3333333333333333 + 0.5))
        gate = tl.where(x >= 3.0, 1.0, tl.where(x <= -3.0, 0.0, (x + 3.0) * 0.16666666666666666))
        return x * gate, slope
    elif KIND == "relu":  # no upper bound, so that inf keeps its gradient as in torch
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    else:
        clamped = tl.where(x <= low, low, tl.where(x >= high, high, x))
        inside = tl.where((x <= low) | (x >= high), 0.0, 1.0)
        if KIND == "hardsigmoid":
            return (clamped + 3.0) * 0.16666666666666666, inside
        else:
            return clamped, inside


def activate_into(x: torch.Tensor, kind: str, low: float, high: float, out: torch.Tensor) -> None:
    """The activation by torch's own kernels; `out` may be x. Only hardtanh reads low and high."""
    aten = torch.ops.aten
    if kind == "relu":
        aten.clamp_min.out(x, 0, out=out)
    elif kind in ("relu6", "hardtanh"):
        aten.clamp.out(x, low, high, out=out)
    elif kind in ("gelu", "gelu_tanh"):
        aten.gelu.out(x, approximate="tanh" if kind == "gelu_tanh" else "none", out=out)
    elif kind == "silu":
        aten.silu.out(x, out=out)
    else:
        {"hardsigmoid": aten.hardsigmoid, "hardswish": aten.hardswish}[kind].out(x, out=out)


def derivative_ref(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The derivative of a smooth kind in fp32 (fp64 for fp64), by torch's own backward."""
    x = x if x.dtype == torch.float64 else x.float()
    ones = x.new_ones(()).expand_as(x)
    if kind in ("gelu", "gelu_tanh"):
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        derivative: torch.Tensor = torch.ops.aten.gelu_backward(ones, x, approximate=approximate)
    elif kind == "silu":
        derivative = torch.ops.aten.silu_backward(ones, x)
    else:
        derivative = torch.ops.aten.hardswish_backward(ones, x)
    return derivative


def bounds(kind: str, low: float | None, high: float | None) -> tuple[float, float]:
    """(low, high) of an exact kind: hardtanh's own when given, else the kind's; (0, 0) for a smooth kind.

    Raises: ValueError for an unknown kind, or bounds where the kind has its own.
    """
    if kind not in EXACT and kind not in SMOOTH:
        raise ValueError(f"activation: got {kind!r}, wanted one of {', '.join(EXACT | SMOOTH)}")
    if kind != "hardtanh" and not (low is None and high is None):
        raise ValueError(f"activation {kind!r}: got bounds ({low}, {high}); only 'hardtanh' takes them")
    if kind in SMOOTH:
        return 0.0, 0.0
    exact = EXACT[kind]
    return exact.low if low is None else low, exact.high if high is None else high
