"""Whether a call must keep anything for a backward at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def builds_graph(x: Tensor) -> bool:
    """Whether autograd records what is done with x: if not, the plain forward is right and keeps nothing."""
    return torch.is_grad_enabled() and x.requires_grad


def is_frozen(module: nn.Module) -> bool:
    """Whether none of the module's own parameters is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
