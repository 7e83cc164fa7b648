"""The training loop behind the command: one epoch, one evaluation, and the optimizers of the methods compared.

Batches are iterables of (input [N, ...], label [N]); they are moved to the device of the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, AdamW, Optimizer

from trady_triton import Plan, TraDyOptimizer, apply_plan, backward_in_parts
from trady_triton.ranking import find_head

METHODS = ("trady", "full", "head")
OPTIMIZERS: dict[str, dict[str, Any]] = {"sgd": {}, "momentum": {"momentum": 0.9}, "adamw": {}}

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Tally:
    """What the steps of an epoch summed up: losses and right answers over samples, and wall-clock seconds with the
    loading of data."""

    loss_sum: float = 0.0
    correct: int = 0
    samples: int = 0
    steps: int = 0
    seconds: float = 0.0

    def plus(self, loss: float, correct: int, samples: int, seconds: float) -> Tally:
        """With one more step, whose mean loss over its samples is `loss`."""
        return Tally(
            self.loss_sum + loss * samples,
            self.correct + correct,
            self.samples + samples,
            self.steps + 1,
            self.seconds + seconds,
        )

    @property
    def loss(self) -> float:
        """Mean over the samples."""
        return self.loss_sum / self.samples

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.samples


def make_optimizer(
    model: nn.Module,
    method: str,
    *,
    lr: float,
    weight_decay: float = 0.0,
    plan: Plan | None = None,
    optimizer: str = "sgd",
) -> Optimizer:
    """Set up the model for a method and return its optimizer: "sgd" as in the paper, "momentum" (0.9) or "adamw".

    "trady" applies `plan` to the model and trains the drawn channels and the head, "full" trains every parameter,
    "head" the classifier alone.

    Raises:
        ValueError: an unknown method or optimizer, no plan for "trady", a plan for another model or one that has not
            counted the optimizer's state, or a model without a classifier.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r}: wanted one of {', '.join(OPTIMIZERS)}")
    if method == "trady":
        if plan is None:
            raise ValueError("method 'trady' needs a plan")
        apply_plan(model, plan)
        algorithm = "adamw" if optimizer == "adamw" else "sgd"
        return TraDyOptimizer(model.parameters(), plan, lr, weight_decay, algorithm=algorithm, **OPTIMIZERS[optimizer])
    if method not in METHODS:
        raise ValueError(f"method {method!r}: wanted one of {', '.join(METHODS)}")
    trained = list(model.parameters()) if method == "full" else _head_parameters(model)
    chosen = {id(parameter) for parameter in trained}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    kind = AdamW if optimizer == "adamw" else SGD
    return kind(trained, lr=lr, weight_decay=weight_decay, **OPTIMIZERS[optimizer])


def make_scheduler(optimizer: Optimizer, *, steps: int, warmup_steps: int = 0) -> Scheduler:
    """The paper's learning rate: linear from 0 over `warmup_steps`, then a cosine to 0 at `steps`, set every step."""
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, steps - warmup_steps),
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def start_epoch(optimizer: Optimizer, epoch: int) -> None:
    """Draw the channels of an epoch where the optimizer trains channels; the same epoch twice changes nothing."""
    if isinstance(optimizer, TraDyOptimizer):
        optimizer.resample(epoch)


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Batches,
    loss_fn: Loss,
    *,
    scheduler: Scheduler | None = None,
    first_update: int = 0,
    max_grad_norm: float | None = None,
    micro_batch: int | None = None,
    tally: Tally = Tally(),
    on_step: Callable[[Tally], None] | None = None,
) -> Tally:
    """Train on every batch once. Call `start_epoch(optimizer, epoch)` before.

    Args:
        scheduler: a timm scheduler in steps; after each step it is told the number of updates made so far.
        first_update: the updates made in earlier epochs.
        max_grad_norm: clip the total norm of everything that is trained to this.
        micro_batch: samples of a batch that are forwarded at once, as a plan for a memory has it; None for all.
        tally: of the epoch's earlier steps, where the batches are its rest.
        on_step: called with the tally when a step is complete; an exception that it raises leaves model and optimizer
            between steps.

    Raises:
        ValueError: no batches, or a loss that is not finite.
    """
    train_mode(model)
    device = next(model.parameters()).device
    start, first = time.perf_counter(), tally.steps
    for inputs, target in batches:
        inputs, target = inputs.to(device), target.to(device)
        loss, hits = train_step(model, optimizer, inputs, target, loss_fn, max_grad_norm, micro_batch)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {tally.steps}: lower the learning rate, or clip the gradient norm"
            )
        end = time.perf_counter()
        tally, start = tally.plus(loss, hits, len(target), end - start), end
        if scheduler is not None:
            scheduler.step_update(first_update + tally.steps - first)
        if on_step is not None:
            on_step(tally)
    if tally.steps == first:
        raise ValueError("no batches to train on")
    return tally


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    inputs: Tensor,
    target: Tensor,
    loss_fn: Loss,
    max_grad_norm: float | None = None,
    micro_batch: int | None = None,
) -> tuple[float, int]:
    """One update; the loss and the number of right answers before it."""
    hits = 0

    def scored(output: Tensor, part: Tensor) -> Tensor:
        nonlocal hits
        hits += int((output.detach().argmax(1) == part).sum())
        return loss_fn(output, part)

    optimizer.zero_grad()
    loss = backward_in_parts(model, inputs, target, scored, micro_batch)
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_grad_norm)
    optimizer.step()
    return loss.item(), hits


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> float:
    """Share of right answers. Leaves the model in eval mode.

    Raises:
        ValueError: no batches.
    """
    model.eval()
    device = next(model.parameters()).device
    correct = samples = 0
    for inputs, target in batches:
        correct += int((model(inputs.to(device)).argmax(1) == target.to(device)).sum())
        samples += len(target)
    if samples == 0:
        raise ValueError("no batches to evaluate on")
    return correct / samples


def train_mode(model: nn.Module) -> None:
    """`model.train()`, but normalisation whose scale and shift are frozen stays in eval mode.

    A frozen BatchNorm in train mode would still move its running statistics, away from the frozen weights that they
    belong to, and would keep its whole input for the backward: more memory than the plan saves.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()


def _head_parameters(model: nn.Module) -> list[nn.Parameter]:
    modules = dict(model.named_modules())
    head = [parameter for name in find_head(model, []) for parameter in modules[name].parameters()]
    if not head:
        raise ValueError(f"{type(model).__name__} has no classifier to train: get_classifier() names none")
    return head
