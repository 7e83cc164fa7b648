"""Transformers: a callback for Trainer that draws the channels, clips and clears the compact gradients.

optimizer = TraDyOptimizer(model.parameters(), plan, lr=0.05)
trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[TraDyCallback()])
"""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trady_triton.integrations.accelerate import unwrap_optimizer


class TraDyCallback(TrainerCallback):  # type: ignore[misc]
    """Draws new channels in every epoch; an optimizer with `resample_every=n` draws them itself, every n steps.

    What is drawn follows from the trainer's epoch, or from the optimizer's count of steps, so a run that is resumed in
    mid-epoch trains the channels that it was stopped with.

    Trainer clips and clears `model.parameters()`, among which compact gradients are not. So the optimizer clips, all
    that is trained as one, to its own `max_grad_norm` or else to that of the arguments; and the callback clears the
    compact gradients after each step. The norm that Trainer logs lacks the compact ones.
    """

    def __init__(self) -> None:
        self._clipping: tuple[float, float | None] | None = None
        self._epoch: int | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Let the optimizer clip; raises TypeError where the trainer has another optimizer."""
        self._epoch = None
        inner = unwrap_optimizer(optimizer)
        self._clipping = args.max_grad_norm, inner.max_grad_norm
        # Without a norm the optimizer would tell of Trainer's way to measure one: it clips to infinity.
        inner.max_grad_norm = inner.max_grad_norm or args.max_grad_norm or math.inf
        args.max_grad_norm = 0.0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **kwargs: Any
    ) -> None:
        """Give the clipping back."""
        if self._clipping is not None:
            args.max_grad_norm, unwrap_optimizer(optimizer).max_grad_norm = self._clipping
            self._clipping = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **kwargs: Any
    ) -> None:
        """Draw the channels of the epoch."""
        # Of data without a length Trainer's epoch is a share of max_steps, which only tells where a training begins.
        self._epoch = int(state.epoch or 0) if self._epoch is None else self._epoch + 1
        inner = unwrap_optimizer(optimizer)
        if inner.resample_every == "epoch":
            inner.resample(self._epoch)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **kwargs: Any
    ) -> None:
        """Clear the gradients, which Trainer does for the model's own parameters alone."""
        unwrap_optimizer(optimizer).zero_grad()
