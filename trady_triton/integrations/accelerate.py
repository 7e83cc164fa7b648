"""accelerate: the optimizer behind the wrapper that `Accelerator.prepare` puts around it."""

from __future__ import annotations

from accelerate.optimizer import AcceleratedOptimizer
from torch.optim import Optimizer

from trady_triton.optimizer import TraDyOptimizer


def unwrap_optimizer(optimizer: Optimizer | None) -> TraDyOptimizer:
    """The TraDyOptimizer that `Accelerator.prepare` wrapped, whose `resample` the wrapper does not forward.

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for epoch in range(epochs):
            unwrap_optimizer(optimizer).resample(epoch)

    Raises:
        TypeError: it is another optimizer.
    """
    inner = optimizer
    while isinstance(inner, AcceleratedOptimizer):
        inner = inner.optimizer
    if not isinstance(inner, TraDyOptimizer):
        raise TypeError(f"optimizer of type {type(inner).__name__}: wanted a TraDyOptimizer, wrapped or not")
    return inner
