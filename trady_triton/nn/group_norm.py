"""GroupNorm and RMSNorm that may keep their input in one byte an element."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trady_triton.nn.packed import packed_call, planes
from trady_triton.policy import Policy


def lean_group_norm(module: nn.GroupNorm, x: Tensor, policy: Policy) -> Tensor:
    """F.group_norm of x [N, C, *S] by the module, keeping what the policy allows."""

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, module.num_groups, weight, bias, module.eps)

    return packed_call(run, x, planes(x), policy, module.weight, module.bias)


def lean_rms_norm(module: nn.Module, x: Tensor, policy: Policy) -> Tensor:
    """F.rms_norm of x [..., C] by the module, torch's or timm's, keeping what the policy allows."""
    shape: tuple[int, ...] = module.normalized_shape  # type: ignore[assignment]

    def run(x: Tensor, weight: Tensor | None) -> Tensor:
        return F.rms_norm(x, shape, weight, module.eps)  # type: ignore[arg-type]

    policy = Policy() if x.dim() == len(shape) else policy  # a single row has no samples
    return packed_call(run, x, tuple(range(-len(shape), 0)), policy, module.weight)  # type: ignore[arg-type]


class LeanGroupNorm(nn.GroupNorm):
    """nn.GroupNorm that may keep one byte an element."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, C, *S] -> the same shape."""
        return lean_group_norm(self, input, self.policy)


class LeanRMSNorm(nn.RMSNorm):
    """nn.RMSNorm that may keep one byte an element."""

    policy: Policy = Policy()

    def forward(self, x: Tensor) -> Tensor:
        """Input [..., C] -> the same shape."""
        return lean_rms_norm(self, x, self.policy)
