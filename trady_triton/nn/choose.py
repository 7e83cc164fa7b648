"""Which blocks to recompute: those that keep fewer bytes as their input alone than as lean layers.

Found by one forward on fake tensors, which allocate nothing and agree with real ones to the byte.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from trady_triton.arguments import expect
from trady_triton.batch import Batch, Shape, call, made_to
from trady_triton.nn.convert import apply_plan
from trady_triton.plan import Plan

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


def choose_recompute(
    plan: Plan,
    model: nn.Module,
    input_shape: Shape,
    least_gain: float = 2.0,
    scores: Mapping[str, Tensor] | None = None,
) -> Plan:
    """The plan, with a policy that recomputes each block whose bytes that divides by `least_gain` or more. Exact.

    `input_shape` counts the batch, (8, 3, 224, 224), or is a mapping of tensors of the batch's shapes and dtypes.
    Measured at the draw of epoch 0, by `scores` where the sampler cannot draw without; the model is not touched.
    """
    expect("plan", plan, Plan)
    expect("model", model, nn.Module)
    mode = FakeTensorMode()
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    fake = copy.deepcopy(model, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
    apply_plan(fake, replace(plan, policy=replace(plan.policy, recompute=())))
    drawn = plan.sample(0, scores)
    with mode:
        for name, channels in drawn.items():
            fake.get_submodule(name).slot.set(channels)  # type: ignore[union-attr, operator]
        x = made_to(input_shape, tensors[0])
        kept, inputs = _bytes_by_block(fake, blocks(fake), x)
    cheaper = tuple(name for name in inputs if 0 < inputs[name] * least_gain <= kept[name])
    return replace(plan, policy=replace(plan.policy, recompute=cheaper))


def _bytes_by_block(model: nn.Module, names: Sequence[str], x: Batch) -> tuple[Counter[str], dict[str, int]]:
    """(bytes that lean layers keep inside each block, bytes of each block's inputs) in one forward."""
    kept: Counter[str] = Counter()
    inputs: dict[str, int] = {}
    running: list[str] = []
    seen = {_storage(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in seen:
            seen[_storage(tensor)] = tensor
            kept[running[-1] if running else ""] += tensor.untyped_storage().nbytes()
        return tensor

    with _named_calls(model, names, running, inputs), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(model, x)
    return kept, inputs


@contextmanager
def _named_calls(model: nn.Module, names: Sequence[str], running: list[str], inputs: dict[str, int]) -> Iterator[None]:
    """Keep the name of the running block on `running` and note the bytes of its inputs."""
    hooks = []
    for name in names:

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            inputs[name] = inputs.get(name, 0) + sum(tensor.numel() * tensor.itemsize for tensor in tensors)
            running.append(name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            running.pop()

        block = model.get_submodule(name)
        hooks += [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
