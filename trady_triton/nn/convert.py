"""apply_plan and remove_plan: turn a network's layers into lean ones and back, in place.

A module keeps its identity, parameters, hooks and attributes; only its class changes to a subclass that has the same
state and another forward (as torch's lazy modules and `fully_shard` do). So names, tied weights and state_dict stay.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trady_triton.arguments import expect
from trady_triton.cost import LayerShape
from trady_triton.nn.attention import attention_modules
from trady_triton.nn.chain import Chain, find_runs, links_of
from trady_triton.nn.parts import updates_statistics
from trady_triton.nn.recompute import recomputed
from trady_triton.plan import Plan
from trady_triton.policy import Policy
from trady_triton.registry import is_trainable, lean_type
from trady_triton.slot import ChannelSlot, Pool, attach_pool, detach_pool


@dataclass(frozen=True)
class AppliedPlan:
    """What apply_plan leaves on the model, as attribute `trady`: the plan, and what remove_plan must bring back."""

    plan: Plan
    classes: dict[str, type[nn.Module]]
    requires_grad: dict[str, bool]


WRAPPERS = ("module", "_orig_mod")  # where DataParallel and its kin, and torch.compile, keep the model


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Freeze the network but for the head, and swap its Conv2d and Linear layers for lean ones, in place.

    Layers of the pool get a slot for their channels, which the optimizer fills; all others keep no input for the
    backward. `requires_grad` is set here once and not touched again. Values of the forward do not change.

    Returns:
        the same model.

    Raises:
        ValueError: the plan was made for another model, or the model has a plan already. Nothing is changed then.
    """
    expect("model", model, nn.Module)
    expect("plan", plan, Plan)
    if hasattr(model, "trady"):
        raise ValueError("the model has a plan already: call remove_plan(model) first")
    _check_fits(model, plan)
    trained = _trained_parameters(model, plan)
    modules = dict(model.named_modules())
    runs, attention = find_runs(plan.policy.recompute, modules), attention_modules(model)
    swaps = {
        name: lean
        for name, module in modules.items()
        if not _is_trained_whole(module, trained) and (lean := _lean_class(name, module, plan, runs, attention))
    }
    model.trady = AppliedPlan(  # type: ignore[assignment]
        plan,
        {name: type(modules[name]) for name in swaps},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    )
    for name, lean in swaps.items():
        modules[name].__class__ = lean
        if hasattr(lean, "policy"):
            modules[name].policy = plan.policy
    for name in runs.keys() & swaps.keys():
        modules[name].runs = runs[name]
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    _install_slots(model, plan)
    return model


def remove_plan(model: nn.Module) -> nn.Module:
    """Undo apply_plan in place: the layers' classes and every requires_grad; trained weights stay as they are.

    What was taken out of the model since, such as an old head, is passed over.

    Raises:
        ValueError: the model has no plan.
    """
    applied = getattr(model, "trady", None)
    if not isinstance(applied, AppliedPlan):
        raise ValueError("the model has no plan to remove")
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, kind in applied.classes.items():
        if isinstance(module := modules.get(name), kind):
            for runtime in ("slot", "policy", "runs"):
                module.__dict__.pop(runtime, None)
            module.__class__ = kind
    for name in applied.requires_grad.keys() & parameters.keys():
        detach_pool(parameters[name])
        parameters[name].requires_grad_(applied.requires_grad[name])
    del model.trady
    return model


def _check_fits(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules())
    for name, shape in plan.shapes.items():
        module = modules.get(name)
        if not isinstance(module, nn.Conv2d | nn.Linear):
            found = type(module).__name__ if name in modules else "no module"
            inner = next((own for own in WRAPPERS if f"{own}.{name}" in modules), None)
            hint = f"give the model itself, which this one wraps as .{inner}" if inner else "rank this model"
            raise ValueError(f"layer {name!r}: the plan wants a Conv2d or Linear, found {found}; {hint}")
        if not is_trainable(module):
            raise ValueError(
                f"layer {name!r}: nobody taught a lean form of {type(module).__name__} (see register_lean), or its "
                "weight is no parameter but made of others at every call"
            )
        found_sizes, wanted = _sizes(module), _planned_sizes(shape)
        if found_sizes != wanted:
            raise ValueError(
                f"layer {name!r}: (in, out, groups, kernel) is {found_sizes}, the plan wants {wanted}; rank this model"
            )
    for name in plan.head:
        if name not in modules:
            raise ValueError(f"head {name!r}: the model has no module of that name; rank this model")
    if (twice := next(_updating_twice(model, plan.policy), None)) is not None:
        raise ValueError(f"recompute: the second run would update the running statistics of {twice!r} again; wanted "
                         "batch_norm 'eval', and a type that was taught (see register_lean)")  # fmt: skip


def _updating_twice(model: nn.Module, policy: Policy) -> Iterator[str]:
    """Names of the normalisations inside what is recomputed that would move their statistics twice."""
    modules = dict(model.named_modules())
    runs = find_runs(policy.recompute, modules)
    units = [modules[name] for name in policy.recompute if name in modules]
    units += [link for chain in runs for start, stop in runs[chain] for link in links_of(modules[chain])[start:stop]]
    if policy.attention == "recompute":
        units += [modules[name] for name in attention_modules(model)]
    inside = {id(module) for unit in units for module in unit.modules()}
    return (name for name, module in modules.items() if id(module) in inside and updates_statistics(module, policy))


def _sizes(module: nn.Conv2d | nn.Linear) -> tuple[int, int, int, tuple[int, ...]]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, 1, ()
    return module.in_channels, module.out_channels, module.groups, tuple(module.kernel_size)


def _planned_sizes(shape: LayerShape) -> tuple[int, int, int, tuple[int, ...]]:
    return shape.in_channels, shape.out_channels, shape.groups, shape.kernel_size


def _trained_parameters(model: nn.Module, plan: Plan) -> set[int]:
    """Ids of the parameters that are trained whole: the head, and on request biases and normalisation."""
    modules = dict(model.named_modules())
    chosen = [parameter for name in plan.head for parameter in modules[name].parameters()]
    if plan.train_bias:
        chosen += [bias for name in plan.shapes if isinstance(bias := modules[name].bias, nn.Parameter)]
    norms = [module for module in modules.values() if _is_trained_norm(module, plan)]
    chosen += [parameter for norm in norms for parameter in norm.parameters(recurse=False)]
    return {id(parameter) for parameter in chosen}


def _is_trained_norm(module: nn.Module, plan: Plan) -> bool:
    """Whether the affine of a module is trained. Kinds have no common base (timm's RmsNorm), but all are named so."""
    if plan.train_norm:
        return "norm" in type(module).__name__.lower()
    return plan.policy.batch_norm == "affine" and isinstance(module, _BatchNorm)


def _is_trained_whole(module: nn.Module, trained: set[int]) -> bool:
    """Whether this is a layer of the head, or shares the weight of one."""
    return isinstance(module, nn.Conv2d | nn.Linear) and id(module.weight) in trained


def _lean_class(
    name: str, module: nn.Module, plan: Plan, chains: Container[str], attention: Container[str]
) -> type[nn.Module] | None:
    """The class that a module outside the head takes: lean if its type was taught, recomputed if the plan says so.

    Attention that the policy keeps takes its own: it is known, so the ledger does not call it untaught.
    """
    if any(name == head or name.startswith(head + ".") for head in plan.head):
        return None
    policy, lean = plan.policy, lean_type(type(module))
    if lean is not None and issubclass(lean, Chain) and name not in chains:
        lean = None
    if name in policy.recompute or (name in attention and policy.attention == "recompute"):
        return recomputed(lean or type(module))  # type: ignore[arg-type]
    return type(module) if lean is None and name in attention else lean


def _install_slots(model: nn.Module, plan: Plan) -> None:
    """One slot for every weight of the pool, shared by all modules that share the weight."""
    slots = {}
    for name in plan.pool:
        layer = model.get_submodule(name)
        groups = getattr(layer, "groups", 1)
        slot = ChannelSlot(name, layer.weight, groups, plan.fingerprint, plan.store_bits)  # type: ignore[arg-type]
        slots[id(layer.weight)] = slot
    pool = Pool(plan, tuple(slots.values()), weakref.ref(model))
    attach_pool(pool, (p for p in model.parameters() if p.requires_grad))
    for module in model.modules():
        if id(getattr(module, "weight", None)) in slots and isinstance(module, nn.Conv2d | nn.Linear):
            module.slot = slots[id(module.weight)]  # type: ignore[assignment]
