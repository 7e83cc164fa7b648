"""The update: SGD and AdamW on parameters that are trained whole, and on the drawn channels of many weights at once.

Both are those of torch.optim: for whole parameters its own functions, for channels one fused launch over all layers of
a device and dtype. Weight decay reaches only what is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from trady_triton.ops import adamw_corrections, adamw_hyper, scatter_update_, sgd_hyper, update_tables
from trady_triton.ops.dispatch import use_triton
from trady_triton.optim.states import State, state_names
from trady_triton.sharding import is_sharded
from trady_triton.slot import ChannelSlot

# Under the addresses that they hold, and what else they follow from.
_Tables = dict[tuple[object, ...], tuple[Tensor, Tensor]]


class Trained(NamedTuple):
    """A slot whose proxy has a gradient, its state, and the options of its group."""

    slot: ChannelSlot
    state: State
    group: Mapping[str, Any]


def update_whole(algorithm: str, group: Mapping[str, Any], parameters: list[Tensor], states: Sequence[State]) -> None:
    """One step of parameters that are trained whole and have gradients, all of one group."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    lr, decay = float(group["lr"]), group["weight_decay"]
    if algorithm == "adamw":
        averages, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(
            parameters, grads, averages, squares, [], steps, foreach=False, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=lr, weight_decay=decay, eps=group["eps"], maximize=False,
        )  # fmt: skip
        return
    momenta: list[Tensor | None] = [state.get("momentum_buffer") for state in states]
    sgd(
        parameters, grads, momenta, foreach=False, weight_decay=decay, momentum=group["momentum"], lr=lr,
        dampening=0.0, nesterov=group["nesterov"], maximize=False,
    )  # fmt: skip


class ChannelUpdate:
    """One step of drawn channels; keeps the launch tables, which only change when a tensor moves."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self._tables: _Tables = {}

    def __call__(self, trained: Iterable[Trained]) -> None:
        """Update what is trained, in as few launches as devices, dtypes and kinds of rules allow."""
        launches: dict[object, list[Trained]] = {}
        for item in trained:
            weight, names = item.slot.weight, state_names(self.algorithm, item.group)
            launches.setdefault((weight.device, weight.dtype, names, item.group.get("nesterov")), []).append(item)
        tables: _Tables = {}
        for items in launches.values():
            tables |= self._launch(items)
        self._tables = tables

    def _launch(self, items: list[Trained]) -> _Tables:
        group = items[0].group
        weights, channels = map(list, zip(*(_operand(item.slot) for item in items), strict=True))
        names = state_names(self.algorithm, group)
        states = [[item.state[name] for item in items] for name in names]
        grads = [item.slot.gradient() for item in items]
        hyper = torch.tensor([_hyper(self.algorithm, item.group) for item in items], dtype=torch.float64)
        tables = self._tables_of(weights, grads, channels, states)
        momenta, variances = [*states, (), ()][:2]
        scatter_update_(
            weights, grads, channels, hyper, momenta, variances, self.algorithm, bool(group.get("nesterov")),
            tables=next(iter(tables.values()), ()), corrections=self._age(items),
        )  # fmt: skip
        for item, weight in zip(items, weights, strict=True):
            if weight is not item.slot.weight:
                item.slot.scatter_(weight.transpose(0, 1))
        return tables

    def _age(self, items: list[Trained]) -> Tensor | None:
        """Count one step of every channel; the bias corrections of all, in order."""
        if self.algorithm != "adamw":
            return None
        torch._foreach_add_([item.state["step"] for item in items], 1)
        runs = groupby(items, key=lambda item: item.group["betas"])
        return torch.cat([adamw_corrections(torch.cat([i.state["step"] for i in run]), betas) for betas, run in runs])

    def _tables_of(
        self, weights: list[Tensor], grads: list[Tensor], channels: list[Tensor], states: list[list[Tensor]]
    ) -> _Tables:
        """The launch tables, where a kernel is launched; of fake tensors there are no addresses."""
        if not use_triton(weights[0]) or isinstance(weights[0], FakeTensor):
            return {}
        addresses = map(Tensor.data_ptr, chain(weights, channels, *states))
        key = (*addresses, *map(len, channels), *map(Tensor.stride, weights))
        return {key: self._tables.get(key) or update_tables(weights, grads, channels, *states)}


def _operand(slot: ChannelSlot) -> tuple[Tensor, Tensor]:
    """The weight to update and its channels; of a sharded weight a copy [O/G, K, ...] of the drawn part alone.

    Every process then steps the whole compact state, which stays the same on all, and writes back the rows it owns.
    """
    if not is_sharded(slot.weight):
        return slot.weight, slot.channels
    return slot.gather().transpose(0, 1).contiguous(), torch.arange(len(slot.channels), device=slot.channels.device)


def _hyper(algorithm: str, group: Mapping[str, Any]) -> list[float]:
    lr, decay = float(group["lr"]), group["weight_decay"]
    if algorithm == "adamw":
        return adamw_hyper(lr, 1, group["betas"], group["eps"], decay)
    return sgd_hyper(lr, group["momentum"], weight_decay=decay)
