"""A training step, run for its memory: on fake tensors, which compute nothing, or on the real ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from trady_triton.batch import Batch, Shape, call, device_of, emptied, made_to, num_samples, split
from trady_triton.microbatch import backward_in_parts, casts, check_micro_batch
from trady_triton.nn import apply_plan, remove_plan
from trady_triton.optimizer import TraDyOptimizer
from trady_triton.plan import Plan
from trady_triton.slot import ChannelSlot, find_slot

# By how many states of a drawn channel the plan has counted.
_OPTIMIZERS: tuple[dict[str, Any], ...] = ({}, {"momentum": 0.9}, {"algorithm": "adamw"})

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Step:
    """One training step: a batch, its loss, and how it is run.

    The model is in train mode. `autocast` is the dtype of torch.autocast around forward and loss, None without.
    """

    inputs: Batch
    target: Batch
    loss_fn: Loss = F.cross_entropy
    autocast: torch.dtype | None = None
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        check_micro_batch(self.micro_batch)

    @property
    def size(self) -> int:
        """Samples of the batch."""
        return num_samples(self.inputs)

    @property
    def device(self) -> torch.device:
        """Where the batch is."""
        return device_of(self.inputs)

    @property
    def part(self) -> tuple[Batch, Batch]:
        """The samples that run at once: the first micro-batch."""
        return self.first(self.micro_batch or self.size)

    def first(self, count: int) -> tuple[Batch, Batch]:
        """Inputs and target of the first samples."""
        return split(self.inputs, count)[0], split(self.target, count)[0]

    def backward(self, model: nn.Module) -> None:
        """Forward, loss and backward of the whole batch."""
        backward_in_parts(model, self.inputs, self.target, self.loss_fn, self.micro_batch, self.autocast)

    def forward(self, model: nn.Module) -> Tensor:
        """Forward and loss of one part."""
        inputs, target = self.part
        with casts(self.device, self.autocast):
            return self.loss_fn(call(model, inputs), target)

    @torch.no_grad()
    def inference(self, model: nn.Module) -> None:
        """A forward of one part that keeps nothing."""
        with casts(self.device, self.autocast):
            call(model, self.part[0])


@contextmanager
def fake_copy(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the model without storage, and the fake mode to run it in. The model itself is not touched.

    The copy shares nothing with the model but its hooks. A plan that was applied to the model is taken off the copy.

    Raises:
        ValueError: what is run inside depends on the values of tensors, which the copy's have none of.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {id(tensor): mode.from_tensor(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        twin = copy.deepcopy(model, fakes)
        if hasattr(twin, "trady"):
            remove_plan(twin)
        try:
            with _WideStatistics():  # type: ignore[no-untyped-call]
                yield twin
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(f"{type(model).__name__} cannot be predicted: its forward depends on values, by {error}; "
                             "measure() a step instead, and give a budget instead of a memory") from error  # fmt: skip


_NORM_WEIGHTS = {torch.ops.aten.native_layer_norm.default: 2, torch.ops.aten.native_group_norm.default: 1}


class _WideStatistics(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives a fake LayerNorm's and GroupNorm's statistics the dtype of the CPU's own: that of the weight."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _NORM_WEIGHTS and args[0].is_cpu and (weight := args[_NORM_WEIGHTS[func]]) is not None:
            y, *statistics = out
            return y, *(value.to(weight.dtype) for value in statistics)
        return out


def fake_step(
    model: nn.Module,
    input_shape: Shape,
    *,
    target: Batch | None,
    loss_fn: Loss,
    autocast: torch.dtype | None,
    micro_batch: int | None,
) -> Step:
    """A step on a batch of that shape [N, ...] without content, for a model of `fake_copy`, inside its fake mode.

    Without a target, N class labels are taken; of a mapping of tensors, the mapping itself.
    """
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    inputs = made_to(input_shape, weight)
    labels: Batch
    if target is not None:
        labels = emptied(target, weight.device)
    elif isinstance(inputs, Mapping):
        labels = inputs
    else:
        labels = torch.empty(num_samples(inputs), dtype=torch.int64, device=weight.device)
    return Step(inputs, labels, loss_fn, autocast, micro_batch)


def train_under(
    model: nn.Module, plan: Plan | None, channels: Mapping[str, Sequence[int]], weight_decay: float = 0.0
) -> Optimizer:
    """Put a model in train mode under a plan, and an optimizer with these channels that changes no weight (lr 0).

    It keeps the state that the plan has counted. Without a plan everything is trained that requires a gradient. The
    channels are given because a draw, which is random numbers, cannot be made in fake mode.
    """
    model.train()
    if plan is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return SGD(trained, lr=0.0, weight_decay=weight_decay)
    kind = _OPTIMIZERS[plan.cost.states]
    optimizer = TraDyOptimizer(apply_plan(model, plan).parameters(), plan, lr=0.0, weight_decay=weight_decay, **kind)
    optimizer._install(0, channels)
    return optimizer


@contextmanager
def unchanged(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Put back what a step at learning rate 0 could change: it still turns -0 to 0, and all to NaN if the loss is."""
    if any(parameter.grad is not None for parameter in [*model.parameters(), *trained_by(optimizer)]):
        raise RuntimeError("there are gradients: call optimizer.zero_grad() before a step is measured")
    slots = slots_of(model)
    drawn = [slot.gather() for slot in slots]
    whole = [*(p for p in trained_by(optimizer) if not any(p is slot.proxy for slot in slots)), *model.buffers()]
    before = [tensor.detach().clone() for tensor in whole]
    rates = [group["lr"] for group in optimizer.param_groups]
    modes = {module: module.training for module in model.modules()}
    memory = getattr(optimizer, "memory", None)
    devices = [torch.cuda.current_device()] if any(p.is_cuda for p in model.parameters()) else []
    try:
        if memory is not None:
            optimizer.memory = None  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        with _state_kept(optimizer), torch.random.fork_rng(devices), torch.enable_grad():
            yield
    finally:
        optimizer.zero_grad()
        if memory is not None:
            optimizer.memory = memory  # type: ignore[attr-defined]
            memory.restart()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for tensor, value in zip(whole, before, strict=True):
                tensor.copy_(value)
            for slot, value in zip(slots, drawn, strict=True):
                slot.scatter_(value)


@contextmanager
def _state_kept(optimizer: Optimizer) -> Iterator[None]:
    state = {
        parameter: {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry.items()}
        for parameter, entry in optimizer.state.items()
    }
    scores = getattr(optimizer, "_scores", None)
    try:
        with nullcontext() if scores is None else scores.unchanged():
            yield
    finally:
        optimizer.state.clear()
        optimizer.state.update(state)


def slots_of(model: nn.Module) -> list[ChannelSlot]:
    """The slots of a planned model's weights, one a weight."""
    return [slot for parameter in model.parameters() if (slot := find_slot(parameter)) is not None]


def trained_by(optimizer: Optimizer) -> list[Tensor]:
    """All that has gradients: parameters that are trained whole, and proxies."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
