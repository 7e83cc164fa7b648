"""Gradient checkpointing as timm does it, around another method."""

from __future__ import annotations

from torch import nn

from trady_triton.bench.rivals import partial
from trady_triton.bench.training import Setup, Training, UnavailableError


def _checkpointed(model: nn.Module) -> nn.Module:
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise UnavailableError(f"timm cannot checkpoint this network ({type(error).__name__}: {error})") from error
    return model


def full(model: nn.Module, setup: Setup) -> Training:
    """Every parameter. BatchNorm in train mode updates its statistics twice then (pytorch#96136)."""
    return partial.full(_checkpointed(model), setup)


def pool_dense(model: nn.Module, setup: Setup) -> Training:
    """All weights of the layers that TraDy draws from."""
    return partial.pool_dense(_checkpointed(model), setup)


def drawn_dense(model: nn.Module, setup: Setup) -> Training:
    """All weights of the layers that TraDy's epoch draws from."""
    return partial.drawn_dense(_checkpointed(model), setup)
