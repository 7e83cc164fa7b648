"""Lean classes made at run time, which pickle and copy like written ones."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

from torch import nn

from trady_triton.policy import Policy


class _Made(type):
    """The type of classes that a function made: each is pickled as the call that makes it again."""

    call: tuple[Callable[..., Any], tuple[Any, ...]]


copyreg.pickle(_Made, lambda kind: kind.call)


def made(
    prefix: str, kind: type[nn.Module], forward: Callable[..., Any], maker: Callable[..., Any], *arguments: Any
) -> type[nn.Module]:
    """A subclass of a module type with another forward; `maker(*arguments)` is the call that returns it."""
    body = {"forward": forward, "policy": Policy(), "call": (maker, arguments), "__module__": kind.__module__}
    lean: type[Any] = _Made(f"{prefix}{kind.__name__}", (kind,), body)
    return lean
