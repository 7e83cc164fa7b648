"""TraDyOptimizer: plain SGD on the drawn channels and on what is trained whole, with a fresh draw every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from trady_triton.ops import scatter_update_, sgd_hyper
from trady_triton.plan import Plan
from trady_triton.sampling import Selection
from trady_triton.slot import ChannelSlot, find_pool, find_slot
from trady_triton.strict import StepMemory


class TraDyOptimizer(Optimizer):
    """SGD without momentum (the paper's optimizer) for a model to which `apply_plan` was applied.

    Call `resample(epoch)` at the start of every epoch, then step as usual. `param_groups` hold the tensors that have
    gradients: the parameters that are trained whole (the head), and for each weight of the pool the proxy of its
    compact gradient; so clipping over `param_groups`, schedulers and GradScaler see everything that is trained.
    Weight decay touches the drawn channels only; all other weights stay bit for bit what they are.

    Args:
        params: `model.parameters()`, named parameters, or groups of them; frozen parameters are passed over. Weights of
            the pool that they leave out, as loops do that pass only what requires a gradient, join the first group of
            the largest weight decay.
        plan: the plan that was applied to the model; by default it is found from the parameters.
        lr: learning rate, a float or a 0-dim tensor.
        weight_decay: L2 penalty added to the gradient, as in torch.optim.SGD.
        strict: let `step()` refuse an update whose forward and backward took more than the plan's `memory`. Without it
            nobody looks: another batch size, loss or autocast than the plan was made for go unnoticed. What counts:
            see `StepMemory`; on the CPU what runs inside `with optimizer.metered():`.

    Raises:
        ValueError: a number out of range; `strict` for a plan without `memory`; or the parameters lack a layer of the
            plan: the plan was not applied, another one was, or the model is a copy of the planned one.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        plan: Plan | None = None,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        strict: bool = False,
    ) -> None:
        groups = _listed(params)
        pool = next((found for item in _tensors(groups) if (found := find_pool(item)) is not None), None)
        plan = pool.plan if plan is None and pool is not None else plan
        if not isinstance(plan, Plan):
            raise TypeError(
                f"plan of type {type(plan).__name__}: wanted the Plan that was applied to the model, and "
                "the parameters lead to none"
            )
        self.plan = plan
        self._slots: list[list[ChannelSlot]] = []
        defaults = {"lr": lr, "weight_decay": weight_decay, "trady_epoch": -1, "trady_plan": plan.fingerprint}
        super().__init__(groups, defaults)
        if pool is not None:
            self._add_left_out(pool.slots)
        missing = set(plan.pool) - {slot.layer for slot in self._all_slots()}
        if missing:
            raise ValueError(
                f"{len(missing)} of the plan's {len(plan.pool)} layers are not among the parameters, such as "
                f"{min(missing)!r}: call apply_plan(model, plan) first and give the parameters of that very model; a "
                "deepcopy needs remove_plan and apply_plan of its own"
            )
        assert pool is not None
        self._model = pool.model
        device = self.param_groups[0]["params"][0].device
        self.memory = StepMemory(plan, device, self._owned) if strict else None

    @property
    def epoch(self) -> int | None:
        """The epoch whose channels are installed; None before the first `resample`."""
        epoch = self.param_groups[0]["trady_epoch"]
        return None if epoch < 0 else epoch

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters; their proxies take the place of the frozen weights."""
        _check_range("lr", param_group.get("lr", self.defaults["lr"]))
        _check_range("weight_decay", param_group.get("weight_decay", self.defaults["weight_decay"]))
        params = param_group["params"]
        given = [params] if isinstance(params, Tensor) else list(params)
        named = [item if isinstance(item, tuple) else (None, item) for item in given]
        slots = [slot for _, weight in named if (slot := find_slot(weight)) is not None]
        self._check_slots(slots)
        kept = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        kept += [(_proxy_name(slot), slot.proxy) for slot in slots]
        is_named = any(isinstance(item, tuple) for item in given)
        super().add_param_group({**param_group, "params": kept if is_named else [p for _, p in kept]})
        self._slots.append(slots)

    def resample(self, epoch: int | None = None) -> Selection:
        """Draw the channels of an epoch and install them; without an argument, of the next epoch.

        Asking for the installed epoch again changes nothing (but follows a model that was moved).

        Returns:
            the channels: layer name -> ids, as `plan.sample(epoch)`.

        Raises:
            RuntimeError: a forward waits for its backward, or gradients wait for step() or zero_grad(); or several
                processes train together, between which compact gradients are not synchronised.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError("several processes train together: compact gradients are not synchronised between them")
        epoch = (-1 if self.epoch is None else self.epoch) + 1 if epoch is None else epoch
        channels = self.plan.sample(epoch)
        if epoch != self.epoch or any(slot.is_stale for slot in self._all_slots()):
            self._check_idle()
            self._install(epoch, channels)
        if self.memory is not None:
            self.memory.restart()
        return channels

    def metered(self) -> AbstractContextManager[None]:
        """What an optimizer with `strict` counts on the CPU: forward and backward of a step, or of a part of it.

            with optimizer.metered():
                loss_fn(model(x), y).backward()
            optimizer.step()

        On CUDA, where everything is counted, and without `strict` the block changes nothing.
        """
        return nullcontext() if self.memory is None else self.memory.metered()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the drawn channels and what is trained whole.

        Raises:
            RuntimeError: `resample` was never called, so nothing but the head would be trained; or `strict` and the
                step took more memory than the plan promises. Nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad(), self.metered():
                loss = closure()
        if self.epoch is None:
            raise RuntimeError("no channels are drawn: call optimizer.resample(epoch) at the start of every epoch")
        if self.memory is not None:
            self.memory.check()
        if not self._found_inf():
            for group, slots in zip(self.param_groups, self._slots, strict=True):
                self._step_group(group, slots)
        for slot in self._all_slots():
            slot.draw.unapplied = False
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict()` of the same plan and install the channels of its epoch.

        Raises:
            ValueError: the state belongs to another plan, or to other groups. Nothing is changed then.
        """
        found = {group.get("trady_plan") for group in state_dict["param_groups"]}
        if found != {self.plan.fingerprint}:
            raise ValueError(f"the state belongs to plan {found}, this optimizer runs plan {self.plan.fingerprint}")
        self._check_idle()
        super().load_state_dict(state_dict)
        if self.epoch is not None:
            self._install(self.epoch, self.plan.sample(self.epoch))

    def _step_group(self, group: dict[str, Any], slots: list[ChannelSlot]) -> None:
        lr, decay = float(group["lr"]), group["weight_decay"]
        for parameter in group["params"][: len(group["params"]) - len(slots)]:
            if parameter.grad is not None:
                sgd_(parameter, self._unscaled(parameter.grad), lr, decay)
        self._step_slots([slot for slot in slots if slot.proxy.grad is not None], lr, decay)

    def _step_slots(self, slots: list[ChannelSlot], lr: float, decay: float) -> None:
        """Update the drawn channels: one call for all weights of a device and dtype."""
        for kind in {(slot.weight.device, slot.weight.dtype) for slot in slots}:
            alike = [slot for slot in slots if (slot.weight.device, slot.weight.dtype) == kind]
            scatter_update_(
                [slot.weight for slot in alike],
                [self._unscaled(slot.gradient()) for slot in alike],
                [slot.channels for slot in alike],
                torch.tensor([sgd_hyper(lr, weight_decay=decay)] * len(alike), dtype=torch.float64),
            )

    def _add_left_out(self, pool: Sequence[ChannelSlot]) -> None:
        given = {id(slot) for slot in self._all_slots()}
        slots = [slot for slot in pool if id(slot) not in given]
        self._check_slots(slots)
        place = max(range(len(self.param_groups)), key=lambda i: self.param_groups[i]["weight_decay"])
        group = self.param_groups[place]
        group["params"].extend(slot.proxy for slot in slots)
        if "param_names" in group:
            group["param_names"].extend(map(_proxy_name, slots))
        self._slots[place].extend(slots)

    def _owned(self) -> Iterator[Tensor]:
        """All that lives from step to step: the model, proxies and gradients, ids of channels, states."""
        if (model := self._model()) is not None:
            yield from (*model.parameters(), *model.buffers())
        for group in self.param_groups:
            yield from group["params"]
            yield from (parameter.grad for parameter in group["params"] if parameter.grad is not None)
        yield from (slot.channels for slot in self._all_slots())
        yield from (value for state in self.state.values() for value in state.values() if isinstance(value, Tensor))

    def _all_slots(self) -> list[ChannelSlot]:
        return [slot for slots in self._slots for slot in slots]

    def _install(self, epoch: int, channels: Mapping[str, Sequence[int]]) -> None:
        for group, slots in zip(self.param_groups, self._slots, strict=True):
            for slot in slots:
                slot.set(channels[slot.layer])
            group["params"][len(group["params"]) - len(slots) :] = [slot.proxy for slot in slots]
            group["trady_epoch"] = epoch

    def _check_slots(self, slots: list[ChannelSlot]) -> None:
        for slot in slots:
            if slot.plan != self.plan.fingerprint:
                raise ValueError(
                    f"layer {slot.layer!r}: plan {slot.plan} was applied to the model, the optimizer got plan "
                    f"{self.plan.fingerprint}"
                )

    def _check_idle(self) -> None:
        for slot in self._all_slots():
            if slot.is_waiting:
                raise RuntimeError(
                    f"layer {slot.layer!r}: a forward waits for its backward; run it, or drop its output, before "
                    "channels are drawn anew"
                )
            if slot.is_pending:
                raise RuntimeError(
                    f"layer {slot.layer!r}: gradients wait for step(); call it, or zero_grad(), before channels are "
                    "drawn anew"
                )

    def _found_inf(self) -> bool:
        """Whether a GradScaler, which sets `found_inf` around step(), saw a gradient that is not finite."""
        found = getattr(self, "found_inf", None)
        return found is not None and bool(found)

    def _unscaled(self, grad: Tensor) -> Tensor:
        """The gradient without the factor of a GradScaler that left the unscaling to step()."""
        scale = getattr(self, "grad_scale", None)
        return grad if scale is None else grad / scale.to(grad.device)


def sgd_(parameter: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
    """One SGD step on a parameter that is trained whole."""
    if weight_decay != 0:
        grad = grad.add(parameter, alpha=weight_decay)
    parameter.add_(grad, alpha=-lr)


def _listed(params: Iterable[Any]) -> list[Any]:
    """Parameters or groups, with lists in place of iterators that could be read only once."""
    if isinstance(params, Tensor):
        raise TypeError("params is a Tensor: wanted an iterable of parameters or of groups")
    return [
        {**item, "params": list(item["params"])}
        if isinstance(item, dict) and not isinstance(item["params"], Tensor)
        else item
        for item in params
    ]


def _tensors(groups: Iterable[Any]) -> Iterator[Tensor]:
    """Every tensor in parameters, named parameters or groups."""
    for item in groups:
        if isinstance(item, dict):
            yield from _tensors([item["params"]] if isinstance(item["params"], Tensor) else item["params"])
        else:
            yield item[1] if isinstance(item, tuple) else item


def _proxy_name(slot: ChannelSlot) -> str:
    return f"{slot.layer}.weight[:, channels]"


def _check_range(name: str, value: float | Tensor) -> None:
    if not float(value) >= 0:
        raise ValueError(f"{name} {value!r}: wanted a number of at least 0")
