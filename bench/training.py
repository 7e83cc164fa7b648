"""A method set up on a network: how a step is taken and what it may change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer

from trady_triton import Plan, Ranking, make_plan
from trady_triton.bench.nets import Net
from trady_triton.nn import blocks
from trady_triton.rehearsal import Step


class UnavailableError(Exception):
    """A method that this network, device or installation cannot run; the message says why."""


@dataclass(frozen=True)
class Setup:
    """What a method is given beside the network: sizes, ranking, budgets (small, middle, large), learning rate.

    Where the batch is split, plans count the `micro_batch`, but keep the pool of the whole batch.
    """

    net: Net
    ranking: Ranking
    budgets: tuple[str, str, str]
    micro_batch: int | None = None
    lr: float = 1e-4
    last_blocks: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    def plan(self, budget: str | None = None, **options: Any) -> Plan:
        """A plan for the batch; by default of the middle budget."""
        if self.micro_batch is not None:
            options.setdefault("layers", self.pool)
        return self._plan(budget or self.budgets[1], self.input_shape[0], options)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of what runs at once."""
        return (self.micro_batch or self.net.batch, *self.net.input_shape[1:])

    @cached_property
    def pool(self) -> tuple[str, ...]:
        """Layers of the middle budget's pool."""
        return self._plan(self.budgets[1], self.net.batch, {}).pool

    def _plan(self, budget: str, batch_size: int, options: dict[str, Any]) -> Plan:
        return make_plan(
            self.ranking, budget=budget, batch_size=batch_size, activation_dtype=self.net.autocast, **options
        )

    @property
    def head(self) -> tuple[str, ...]:
        """Modules that every method trains whole."""
        return self.ranking.head

    def inside(self, names: Iterable[str], model: nn.Module) -> set[str]:
        """Names of the parameters inside modules."""
        prefixes = tuple(f"{name}." for name in names)
        return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}

    def top(self, model: nn.Module, count: int) -> tuple[str, ...]:
        """The last blocks, and whatever comes after them (the norm before the head, the last convolution)."""
        names, found = [name for name, _ in model.named_modules()], blocks(model)
        first = names.index(found[-count])
        after = [name for name in names[first:] if any(True for _ in model.get_submodule(name).parameters(False))]
        return tuple(after)


@dataclass
class Training:
    """A method set up on a model.

    Attributes:
        model: what is called; it may wrap the network.
        optimizer: of everything that is trained.
        trained: names of the parameters that a step may change, for the gate; for a plan, beside the drawn channels.
        plan: of methods that draw channels.
        start_epoch: draws what an epoch trains; None where every epoch trains the same.
        network: the network inside `model`, whose parameters `trained` names.
    """

    model: nn.Module
    optimizer: Optimizer
    trained: set[str]
    plan: Plan | None = None
    start_epoch: Callable[[int], object] | None = None
    network: nn.Module | None = None

    def __post_init__(self) -> None:
        self.network = self.network or self.model
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Start an epoch: draw, and put the model in train mode, but frozen BatchNorm in eval mode as users do."""
        if self.start_epoch is not None:
            self.start_epoch(epoch)
        self.model.train()
        for module in self.model.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
                module.eval()

    def step(self, step: Step) -> None:
        """Forward, backward and update."""
        self.optimizer.zero_grad()
        step.backward(self.model)
        self.optimizer.step()


def step_of(net: Net, micro_batch: int | None = None, dtype: torch.dtype = torch.float32) -> Step:
    """A training step on the net's batch."""
    return Step(net.inputs(dtype=dtype), net.target(), cross_entropy, net.autocast, micro_batch)


def freeze(model: nn.Module, trained: set[str]) -> Iterator[nn.Parameter]:
    """Let these parameters alone require gradients, and yield them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return (parameter for name, parameter in model.named_parameters() if name in trained)


def sgd(model: nn.Module, setup: Setup, trained: set[str], **more: Any) -> Training:
    """Plain SGD on the named parameters, everything else frozen in plain torch."""
    return Training(model, SGD(freeze(model, trained), lr=setup.lr), trained, **more)
