"""BatchNorm on its running statistics: a scale for each channel, which needs no input back unless it is trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from trady_triton.nn.graph import builds_graph, is_frozen
from trady_triton.nn.packed_input import packed_call, planes
from trady_triton.policy import Policy


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
        scale = (var + ctx.eps).rsqrt() if weight is None else weight * (var + ctx.eps).rsqrt()
        if scale.dtype == dy.dtype:
            dx = dy * scale.view(-1, *(1,) * (dy.dim() - 2))
        else:  # torch's own kernel multiplies in full precision; it takes an input of dY's shape and does not read it
            dx = torch.ops.aten.native_batch_norm_backward(
                dy, dy, weight, mean, var, None, None, False, ctx.eps, (True, False, False)
            )[0]
        return dx, None, None, None, None, None


def lean_batch_norm(module: _BatchNorm, x: Tensor, policy: Policy) -> Tensor | None:
    """The module's normalisation of x [N, C, *S] by its running statistics; None where the plain forward is due.

    That is where there are no running statistics, or the policy gives the batch's own to a module in train mode.
    """
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None or (module.training and policy.batch_norm == "train"):
        return None
    if builds_graph(x) and is_frozen(module):
        y: Tensor = _FrozenBatchNorm.apply(x, mean, var, module.weight, module.bias, module.eps)
        return y

    def run(x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, module.weight, module.bias, False, 0.0, module.eps)

    return packed_call(run, x, planes(x), policy, module.weight, module.bias)


class LeanBatchNorm(_BatchNorm):
    """A BatchNorm that keeps nothing while its statistics and its affine are frozen; to be put before torch's class."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, C, *S] -> the same shape."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        y = lean_batch_norm(self, input, self.policy)
        return super().forward(input) if y is None else y


class LeanBatchNorm1d(LeanBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d: input [N, C] or [N, C, L]."""


class LeanBatchNorm2d(LeanBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d: input [N, C, H, W]."""


class LeanBatchNorm3d(LeanBatchNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d: input [N, C, D, H, W]."""


class LeanSyncBatchNorm(LeanBatchNorm, nn.SyncBatchNorm):
    """nn.SyncBatchNorm: input [N, C, *S]; nothing is exchanged while it normalises by its running statistics."""
