"""The repeated units of a network: what people call its blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the repeated units: the innermost modules with layers in a container, or else in a row of a type."""
    return _innermost(model, _in_container) or _innermost(model, _in_row)


def _innermost(model: nn.Module, is_unit: Callable[[nn.Module, nn.Module], bool]) -> tuple[str, ...]:
    """The modules of two or more layers for which `is_unit(module, parent)`, and inside which there is none such."""
    found: list[str] = []
    for name, module in reversed(list(model.named_modules())):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, _CONTAINERS) or module is model or not is_unit(module, parent):
            continue
        layers = sum(isinstance(child, nn.Conv2d | nn.Linear) for child in module.modules())
        if layers > 1 and not any(inner.startswith(f"{name}.") for inner in found):
            found.append(name)
    return tuple(reversed(found))


def _in_container(module: nn.Module, parent: nn.Module) -> bool:
    return isinstance(parent, _CONTAINERS)


def _in_row(module: nn.Module, parent: nn.Module) -> bool:
    return sum(type(child) is type(module) for child in parent.children()) > 1
