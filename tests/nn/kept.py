"""The bytes that a forward keeps for its backward, and how a lean module is made of a plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from trady_triton.policy import Policy
from trady_triton.registry import lean_type


def kept_bytes(run: Callable[[], Tensor], modules: nn.Module) -> tuple[Tensor, int]:
    """(run(), bytes of the distinct storages that autograd saved, parameters and buffers of `modules` left out)."""
    own = [*modules.parameters(), *modules.buffers()]
    known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in own}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (key := StorageWeakRef(storage).cdata) not in known:
            kept[key] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    return y, sum(storage.nbytes() for storage in kept.values())


def lean_twin(module: nn.Module, **policy: Any) -> nn.Module:
    """A frozen deep copy whose modules of taught types are lean."""
    twin = copy.deepcopy(module).requires_grad_(False)
    for child in twin.modules():
        if (lean := lean_type(type(child))) is not None:
            child.__class__ = lean
            if hasattr(lean, "policy"):
                child.policy = Policy(**policy)
    return twin


def forward_backward(module: nn.Module, x: Tensor, dy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(y, dX) of one call; the input is copied first, and is no leaf, so that in-place modules may write to it."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(leaf * 1)
    y.backward(torch.ones_like(y) if dy is None else dy)
    return y.detach(), leaf.grad
