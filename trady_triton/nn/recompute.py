"""Modules that keep their input alone and run a second time in the backward: exact, for the time of a forward."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@cache
def recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module type whose forward is recomputed in the backward. One class for a type."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **kwargs)
        return checkpoint(kind.forward, self, *args, use_reentrant=False, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (kind,), self.__getstate__()

    body = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__}
    return type(f"Recomputed{kind.__name__}", (kind,), body)


def _rebuild(kind: type[nn.Module]) -> nn.Module:
    """An empty module of the recomputed type, for copies and pickles, which cannot find a class made at run time."""
    return nn.Module.__new__(recomputed(kind))
