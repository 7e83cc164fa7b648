"""Whole networks: a plan that trains chosen layers of them, without ranking, and the plain network beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import trady_triton.models  # noqa: F401  teaches timm's types
from trady_triton.cost import CostModel, LayerShape, measure_call
from trady_triton.plan import Plan
from trady_triton.ranking import find_head
from trady_triton.registry import is_trainable


def random_net(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """A timm network in eval mode whose normalisation is not that of an untrained one (a zero gamma hides errors)."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).to(dtype).eval()
    for module in model.modules():
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if key in ("running_var", "gamma", "weight") and tensor.dim() == 1:
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


@contextmanager
def fake_net(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the model on fake tensors, within their mode."""
    mode = FakeTensorMode()
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
    with mode:
        yield copied


def shapes_in_order(model: nn.Module, x: Tensor) -> dict[str, LayerShape]:
    """Sizes of every layer of a taught type outside the head, in the order of the forward."""
    shapes: dict[str, LayerShape] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and is_trainable(m)}

    def recorder(name: str) -> Any:
        def record(module: nn.Conv2d | nn.Linear, args: tuple[Tensor, ...], y: Tensor) -> None:
            shapes[name] = measure_call(module, args[0], y, x.shape[0])

        return record

    hooks = [module.register_forward_hook(recorder(name)) for name, module in layers.items()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    head = find_head(model, list(shapes))
    return {name: shape for name, shape in shapes.items() if not name.startswith(head)}


def plan_at(model: nn.Module, x: Tensor, depths: tuple[float, ...], **options: Any) -> Plan:
    """A plan whose pool holds the layers at these depths (0 the first, 1 the last), gates and grouped ones aside."""
    shapes = shapes_in_order(model, x)
    usual = [name for name, shape in shapes.items() if shape.groups == 1 and shape.in_positions > 1]
    pool = tuple(dict.fromkeys(usual[int(depth * (len(usual) - 1))] for depth in depths))
    return Plan(shapes, pool, find_head(model, list(shapes)), 10**9, CostModel(), **options)
