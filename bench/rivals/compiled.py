"""Full fine-tuning under torch.compile, whole or with a budget for what it keeps for the backward."""

from __future__ import annotations

import torch
import torch._functorch.config
from torch import nn

from trady_triton.bench.rivals import partial
from trady_triton.bench.training import Setup, Training

ACTIVATION_BUDGET = 0.3  # of the bytes that it would keep otherwise


def full(model: nn.Module, setup: Setup) -> Training:
    """With the default backend, which fuses kernels and decides what to recompute."""
    return _compile(partial.full(model, setup), 1.0)


def full_within_budget(model: nn.Module, setup: Setup) -> Training:
    """The same with `activation_memory_budget`."""
    return _compile(partial.full(model, setup), ACTIVATION_BUDGET)


def _compile(training: Training, budget: float) -> Training:
    torch._dynamo.reset()
    torch._functorch.config.activation_memory_budget = budget
    training.network, training.model = training.model, torch.compile(training.model)  # type: ignore[assignment]
    return training
