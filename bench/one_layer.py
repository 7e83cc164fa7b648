"""Plans that train two channels of one layer, and the head: the setting in which lean modules are counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trady_triton import Plan
from trady_triton.batch import made_to
from trady_triton.cost import CostModel, LayerShape, measure_call
from trady_triton.ranking import find_head
from trady_triton.registry import is_trainable
from trady_triton.rehearsal import fake_copy


def plan_at(model: nn.Module, shape: tuple[int, ...], depth: float) -> Plan:
    """A plan of two channels of the layer at this depth (0 the first, 1 the last), gates and grouped ones aside."""
    shapes: dict[str, LayerShape] = {}
    with fake_copy(model) as twin, torch.no_grad():
        for name, module in twin.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and is_trainable(module):
                module.register_forward_hook(_recorder(name, shapes, shape[0]))
        twin.eval()(made_to(shape, next(twin.parameters())))
    head = find_head(model, list(shapes))
    shapes = {name: sizes for name, sizes in shapes.items() if not name.startswith(head)}
    usual = [name for name, sizes in shapes.items() if sizes.groups == 1 and sizes.in_positions > 1]
    pool = (usual[int(depth * (len(usual) - 1))],)
    cost = CostModel(shape[0], 4, 4, unit="bytes")
    return Plan(shapes, pool, head, 2 * cost.channel_cost(shapes[pool[0]]), cost)


def _recorder(name: str, shapes: dict[str, LayerShape], batch: int) -> Any:
    def record(module: nn.Conv2d | nn.Linear, args: tuple[Tensor, ...], y: Tensor) -> None:
        shapes[name] = measure_call(module, args[0], y, batch)

    return record
