"""Which modules of a network are attention, which a policy may recompute: exact, so that a name is evidence enough."""

from __future__ import annotations

import re

from torch import nn

_NAME = re.compile("(?i:attn|attention)|MHSA|SHMA|GPSA|XCA|MLA")  # "mla" is in LayerNormLayer, and in ReparamLarge


def attention_modules(model: nn.Module) -> set[str]:
    """Names of the innermost modules inside the model that hold layers and are called attention by their types."""
    found: set[str] = set()
    for name, module in reversed(list(model.named_modules())):
        if name and _is_attention(module) and not any(inner.startswith(f"{name}.") for inner in found):
            found.add(name)
    return found


def _is_attention(module: nn.Module) -> bool:
    layers = (child for child in module.modules() if isinstance(child, nn.Conv2d | nn.Linear))
    return _NAME.search(type(module).__name__) is not None and next(layers, None) is not None
