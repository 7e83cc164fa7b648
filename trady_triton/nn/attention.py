"""Which modules of a network are attention, which a policy may recompute: exact, so that a name is evidence enough."""

from __future__ import annotations

from torch import nn

_NAMES = ("attn", "attention", "mhsa", "shma", "gpsa", "xca", "mla")


def attention_modules(model: nn.Module) -> set[str]:
    """Names of the innermost modules that hold layers and are called attention by their types."""
    found: set[str] = set()
    for name, module in reversed(list(model.named_modules())):
        if _is_attention(module) and not any(inner.startswith(f"{name}.") for inner in found):
            found.add(name)
    return found


def _is_attention(module: nn.Module) -> bool:
    called = type(module).__name__.lower()
    layers = (child for child in module.modules() if isinstance(child, nn.Conv2d | nn.Linear))
    return any(name in called for name in _NAMES) and next(layers, None) is not None
