"""Transformers: a callback for Trainer that draws the channels, clips and clears the compact gradients.

optimizer = TraDyOptimizer(model.parameters(), plan, lr=0.05)
trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[TraDyCallback()])
"""

from __future__ import annotations

from typing import Any

from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trady_triton.integrations.accelerate import unwrap_optimizer
from trady_triton.integrations.rounds import check_every


class TraDyCallback(TrainerCallback):  # type: ignore[misc]
    """Draws new channels in every epoch, or every `every` optimizer steps, and never inside an accumulation window.

    What is drawn follows from the trainer's epoch and step alone, so a run that is resumed in mid-epoch trains the
    channels that it was stopped with. Trainer clips and clears `model.parameters()`, among which compact gradients are
    not; so the callback takes over the `max_grad_norm` of the arguments while it trains, clips everything that is
    trained as one, and clears the compact gradients after each step.

    Args:
        every: "epoch", or a number of optimizer steps.
    """

    def __init__(self, every: int | str = "epoch") -> None:
        self.every = check_every(every)
        self.max_grad_norm = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Take over the clipping; raises TypeError where the trainer has another optimizer."""
        unwrap_optimizer(optimizer)
        self.max_grad_norm, args.max_grad_norm = args.max_grad_norm or 0.0, 0.0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the clipping back."""
        args.max_grad_norm = self.max_grad_norm

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **kwargs: Any
    ) -> None:
        """Draw the channels of the epoch."""
        if self.every == "epoch":
            unwrap_optimizer(optimizer).resample(int(state.epoch or 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **kwargs: Any
    ) -> None:
        """Draw the channels of the next steps."""
        if isinstance(self.every, int):
            unwrap_optimizer(optimizer).resample(state.global_step // self.every)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **kwargs: Any
    ) -> None:
        """Clip compact and whole gradients as one; Trainer has unscaled them, to log their norm."""
        if self.max_grad_norm > 0:
            unwrap_optimizer(optimizer).synchronize()
            clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **kwargs: Any
    ) -> None:
        """Clear the gradients, which Trainer does for the model's own parameters alone."""
        unwrap_optimizer(optimizer).zero_grad()
