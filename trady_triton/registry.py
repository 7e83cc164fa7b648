"""The table from a module's exact type to its lean class: who may be ranked, planned and swapped.

Dispatch is on the exact type: a subclass may have another forward (timm's Conv2dSame, ScaledStdConv2d), and patching
it as its parent would change the network without a word.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from torch import Tensor, nn

_LEAN: dict[type[nn.Module], type[nn.Module]] = {}
_taught: set[str] = set()


def register_lean(kind: type[nn.Module], lean: type[nn.Module]) -> None:
    """Teach a layer type: modules whose type is exactly `kind` may become `lean`, a subclass of it."""
    if not issubclass(lean, kind):
        raise TypeError(f"{lean.__name__} must be a subclass of {kind.__name__}, whose state it takes over")
    _LEAN[kind] = lean


def lean_type(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The lean class of an exact type, or None if nobody taught it.

    A package may teach its types by an entry point of group `trady_triton.layers`, named after the package whose
    types it knows; it is loaded when the first type of that package is met.
    """
    package = kind.__module__.partition(".")[0]
    if kind not in _LEAN and package not in _taught:
        _taught.add(package)
        for teacher in entry_points(group="trady_triton.layers", name=package):
            teacher.load()
    if kind not in _LEAN and kind.__mro__[1].__name__ == "FSDPModule":
        # fully_shard gives a module a class of its own, (FSDPModule, kind): it changes no forward.
        lean = lean_type(kind.__mro__[2])
        return lean and type(f"FSDP{lean.__name__}", (kind, lean), {})
    return _LEAN.get(kind)


def is_trainable(module: nn.Module) -> bool:
    """Whether channels of the module may be drawn: its lean class has a slot, and its weight is a parameter.

    A weight that a hook makes of others at every call, as for `torch.nn.utils.weight_norm` and pruning, is none.
    """
    return hasattr(lean_type(type(module)), "slot") and isinstance(getattr(module, "weight", None), nn.Parameter)


def plain_forward(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) by the type that it had before it became lean: what autograd keeps is torch's choice."""
    plain = next((kind for kind, lean in _LEAN.items() if isinstance(module, lean)), None)
    y: Tensor = module(x) if plain is None else plain.forward(module, x)
    return y
