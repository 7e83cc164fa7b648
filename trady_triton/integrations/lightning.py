"""Lightning: a callback that draws the channels.

trainer = Trainer(callbacks=[TraDyCallback()])  # configure_optimizers returns a TraDyOptimizer
"""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from trady_triton.optimizer import TraDyOptimizer


class TraDyCallback(Callback):  # type: ignore[misc]
    """Draws new channels in every epoch; an optimizer with `resample_every=n` draws them itself, every n steps.

    What is drawn follows from the trainer's epoch, or from the optimizer's count of steps, so a run that is resumed
    trains the channels that it was stopped with. Clipping by `Trainer(gradient_clip_val=...)` sees compact gradients;
    with mixed precision Lightning refuses it for optimizers that unscale in their step, as this one: there give the
    optimizer `max_grad_norm`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ValueError for DeepSpeed, which replaces the optimizer by its own."""
        name = type(trainer.strategy).__name__
        if name.startswith("DeepSpeed"):
            raise ValueError(f"strategy {name}: replaces the optimizer; wanted a single device, DDP or FSDP2")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the channels of the epoch; raises TypeError where the trainer has no TraDyOptimizer."""
        found = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, TraDyOptimizer)]
        if not found:
            kinds = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise TypeError(f"optimizers {kinds}: wanted a TraDyOptimizer from configure_optimizers")
        for optimizer in found:
            if optimizer.resample_every == "epoch":
                optimizer.resample(trainer.current_epoch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Average the gradients over all processes before they are clipped."""
        if isinstance(optimizer, TraDyOptimizer):
            optimizer.synchronize()
