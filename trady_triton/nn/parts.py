"""Work on a batch in parts, so that temporaries of full precision stay an eighth of it, and whether one may."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trady_triton.policy import Policy
from trady_triton.registry import lean_type


def can_part(model: nn.Module, policy: Policy) -> bool:
    """Whether parts of a batch give the gradient of the whole: no normalisation uses the batch's own statistics."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return not any(norm.running_mean is None or updates_statistics(norm, policy) for norm in norms)


def updates_statistics(module: nn.Module, policy: Policy) -> bool:
    """Whether this is a BatchNorm that moves its running statistics in train mode: by policy, or because untaught."""
    if not isinstance(module, _BatchNorm) or module.running_mean is None:
        return False
    return policy.batch_norm == "train" or not hasattr(lean_type(type(module)) or type(module), "policy")


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """At most eight views of each tensor along its first dimension, together; all have the same first dimension."""
    rows = (tensor.view(1) if tensor.dim() == 0 else tensor for tensor in tensors)
    return zip(*(tensor.chunk(8) for tensor in rows), strict=True)
