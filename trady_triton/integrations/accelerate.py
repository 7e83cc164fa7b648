"""accelerate: the optimizer behind the wrapper that `Accelerator.prepare` puts around it.

With fp16 a step whose gradients overflow is left out inside `step()`, as torch's fused optimizers do it. accelerate
does not see that: `accelerator.optimizer_step_was_skipped` stays False, and its schedulers count the step.
"""

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
