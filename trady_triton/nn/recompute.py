"""Modules that keep their input alone and run a second time in the backward: exact, for the time of a forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from trady_triton.nn.made import made
from trady_triton.policy import Policy


@cache
def recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module type whose forward is recomputed in the backward. One class for a type."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run_recomputed(self, partial(kind.forward, self), *args, **kwargs)

    return made("Recomputed", kind, forward, recomputed, kind)


def run_recomputed(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """forward(*args, **kwargs) of the module, keeping the inputs alone; the plain call where nothing is recorded.

    Raises:
        ValueError: an argument is a cache, which a second run would fill again.
    """
    if not _records(module, (args, kwargs)):
        return forward(*args, **kwargs)
    for value in (*args, *kwargs.values()):
        if hasattr(value, "update") and not isinstance(value, Mapping):
            kind, given = type(module).__name__.removeprefix("Recomputed"), type(value).__name__
            raise ValueError(f"{kind} is recomputed but is given a {given}, which a second run would fill again: train "
                             "without it (Transformers: model.config.use_cache = False)")  # fmt: skip
    # The lists of the arguments are copied: DenseNet appends to its list of features after the call.
    args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
    parts = _parts(module, args, kwargs)
    if parts < 2:
        run, tensors = _of_each_once(forward, args, kwargs)
        return checkpoint(run, *tensors, use_reentrant=False)
    x, *others = args
    run = partial(checkpoint, forward, use_reentrant=False)
    outputs = [run(part, *others, **kwargs) for part in x.chunk(parts)]
    if not isinstance(outputs[0], Tensor):
        raise TypeError(
            f"recompute_parts {parts}: {type(module).__name__} returns {type(outputs[0]).__name__}, wanted a tensor"
        )
    return torch.cat(outputs)


def _of_each_once(forward: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    """The call as a function of its tensors, each once: a nested checkpoint would make three of attention's x, x, x."""
    leaves, spec = tree_flatten((args, kwargs))
    tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    order = [places.get(id(leaf)) for leaf in leaves]
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def run(*tensors: Tensor) -> Any:
        again = [other if place is None else tensors[place] for place, other in zip(order, others, strict=True)]
        args, kwargs = tree_unflatten(again, spec)
        return forward(*args, **kwargs)

    return run, tensors


def _parts(module: nn.Module, args: Any, kwargs: Any) -> int:
    """How many parts the batch is run in: one where something else than the first argument may be of the batch."""
    wanted: int = getattr(module, "policy", Policy()).recompute_parts
    if not args or not isinstance(args[0], Tensor) or args[0].dim() < 2:
        return 1
    others = [value for value in tree_leaves((args[1:], kwargs)) if isinstance(value, Tensor)]
    return 1 if any(len(args[0]) in tensor.shape[:1] for tensor in others) else min(wanted, len(args[0]))


def _records(module: nn.Module, inputs: Any) -> bool:
    """Whether autograd records anything in a call: `checkpoint` would keep the inputs even if not."""
    if not torch.is_grad_enabled():
        return False
    tensors = (value for value in tree_leaves(inputs) if isinstance(value, Tensor))
    if any(tensor.requires_grad for tensor in (*tensors, *module.parameters())):
        return True
    slots = (getattr(child, "slot", None) for child in module.modules())
    return any(slot is not None and slot.is_drawn for slot in slots)
