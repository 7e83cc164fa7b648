"""LayerNorm with a frozen affine that keeps its normalised input in one byte an element where the policy allows it.

Shapes: T rows, C elements a row. Kept: x_hat [T, C] int8, and of each row 1 / deviation and the step of its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trady_triton.nn.graph import builds_graph, is_frozen
from trady_triton.nn.parts import parts
from trady_triton.policy import Policy


class _PackedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        code = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        rows = x.shape[: x.dim() - len(shape)]
        rstd, step = (torch.empty(rows, dtype=_wide(x), device=x.device) for _ in range(2))
        for x_part, *outs in parts(x, code, rstd, step):
            _encode(x_part, shape, eps, *outs)
        ctx.save_for_backward(code, rstd, step, weight)
        ctx.shape, ctx.dtype = shape, x.dtype
        return F.layer_norm(x, shape, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        code, rstd, step, weight = ctx.saved_tensors
        dx = torch.empty_like(dy, dtype=ctx.dtype)  # under autocast dY may be wider than x
        for out, dy_part, code_part, rstd_part, step_part in parts(dx, dy, code, rstd, step):
            out.copy_(_dgrad(dy_part, code_part, rstd_part, step_part, ctx.shape, weight))
        return dx, None, None, None, None


def lean_layer_norm(module: nn.LayerNorm, x: Tensor, policy: Policy) -> Tensor:
    """F.layer_norm of x [..., C] by the module, keeping what the policy allows."""
    arguments = module.normalized_shape, module.weight, module.bias, module.eps
    if policy.is_exact or not builds_graph(x) or not is_frozen(module) or x.dim() == len(module.normalized_shape):
        return F.layer_norm(x, *arguments)
    y: Tensor = _PackedLayerNorm.apply(x, *arguments)
    return y


class LeanLayerNorm(nn.LayerNorm):
    """nn.LayerNorm that may keep one byte an element."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., C] -> the same shape."""
        return lean_layer_norm(self, input, self.policy)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _encode(x: Tensor, shape: Sequence[int], eps: float, code: Tensor, rstd: Tensor, step: Tensor) -> None:
    """Fill the codes of x_hat and each row's rstd [T] and step [T]."""
    x_hat, _, deviation = torch.native_layer_norm(x.to(_wide(x)), list(shape), None, None, eps)
    rstd.copy_(deviation.view(rstd.shape))
    peak = x_hat.abs().flatten(rstd.dim()).amax(-1).clamp_(min=torch.finfo(x_hat.dtype).tiny)
    step.copy_(peak / 127)
    code.copy_(x_hat.div_(_over_row(step, code)).round_())


def _dgrad(dy: Tensor, code: Tensor, rstd: Tensor, step: Tensor, shape: Sequence[int], weight: Tensor | None) -> Tensor:
    """dX = rstd * (g - mean(g) - x_hat * mean(g * x_hat)), g = dY * weight: torch's own kernel on x_hat / rstd."""
    wide = rstd.dtype
    scaled = code.to(wide).mul_(_over_row(step / rstd, code))
    mean = torch.zeros_like(rstd).view(-1, *(1,) * len(shape))
    weight = None if weight is None else weight.to(wide)
    dx: Tensor = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide).contiguous().view(-1, *shape), scaled.view(-1, *shape), list(shape), mean, rstd.view(mean.shape),
        weight, None, (True, False, False),
    )[0].view(code.shape)  # fmt: skip
    return dx


def _over_row(values: Tensor, like: Tensor) -> Tensor:
    """One value a row [T] -> a view that broadcasts over [T, C]."""
    return values.view(*values.shape, *(1,) * (like.dim() - values.dim()))
