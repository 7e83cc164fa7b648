"""BatchNorm on its running statistics with a frozen affine: a scale for each channel, which needs no input back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from trady_triton.nn.graph import builds_graph, is_frozen


class _FrozenBatchNorm(torch.autograd.Function):
    """F.batch_norm in eval mode; x [N, C, *S]. Keeps references to the module's own tensors and nothing of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(mean, var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, weight = ctx.saved_tensors
        # In eval mode dX = dY * weight / sqrt(var + eps); torch's own kernel takes an input of dY's shape, unread.
        dx = torch.ops.aten.native_batch_norm_backward(
            dy, dy, weight, mean, var, None, None, False, ctx.eps, (True, False, False)
        )[0]
        return dx, None, None, None, None, None


def frozen_batch_norm(module: _BatchNorm, x: Tensor) -> Tensor | None:
    """The module's normalisation of x [N, C, *S] (its activation excluded), keeping nothing of x.

    None where that is not possible and the plain forward is due: no graph is built, the batch's own statistics are
    used, or the affine is trained.
    """
    if module.training or module.running_mean is None or module.running_var is None:
        return None
    if not builds_graph(x) or not is_frozen(module):
        return None
    y: Tensor = _FrozenBatchNorm.apply(
        x, module.running_mean, module.running_var, module.weight, module.bias, module.eps
    )
    return y


class LeanBatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d that keeps nothing in eval mode, if its affine is frozen."""

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, C] or [N, C, L] -> the same shape."""
        self._check_input_dim(input)
        y = frozen_batch_norm(self, input)
        return super().forward(input) if y is None else y


class LeanBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that keeps nothing in eval mode, if its affine is frozen."""

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, C, H, W] -> the same shape."""
        self._check_input_dim(input)
        y = frozen_batch_norm(self, input)
        return super().forward(input) if y is None else y
