"""Lightning: a callback that draws the channels.

trainer = Trainer(callbacks=[TraDyCallback()])  # configure_optimizers returns a TraDyOptimizer
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from trady_triton.integrations.rounds import check_every
from trady_triton.optimizer import TraDyOptimizer
from trady_triton.sampling import Selection


class TraDyCallback(Callback):  # type: ignore[misc]
    """Draws new channels in every epoch, or every `every` optimizer steps, and never inside an accumulation window.

    What is drawn follows from the trainer's epoch and step alone, so a run that is resumed trains the channels that it
    was stopped with. Clipping by `Trainer(gradient_clip_val=...)` sees compact gradients.

    Args:
        every: "epoch", or a number of optimizer steps.
    """

    def __init__(self, every: int | str = "epoch") -> None:
        self.every = check_every(every)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ValueError for DeepSpeed, which replaces the optimizer by its own."""
        name = type(trainer.strategy).__name__
        if name.startswith("DeepSpeed"):
            raise ValueError(f"strategy {name}: replaces the optimizer; wanted a single device, DDP or FSDP2")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the channels of the epoch."""
        if self.every == "epoch":
            resample(trainer, trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw the channels of the next steps."""
        if isinstance(self.every, int):
            resample(trainer, trainer.global_step // self.every)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Average the gradients over all processes before they are clipped."""
        if isinstance(optimizer, TraDyOptimizer):
            optimizer.synchronize()


def resample(trainer: Trainer, epoch: int) -> list[Selection]:
    """`resample(epoch)` of every TraDyOptimizer of a trainer.

    Raises:
        TypeError: it has none.
    """
    found = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, TraDyOptimizer)]
    if not found:
        kinds = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
        raise TypeError(f"optimizers {kinds}: wanted a TraDyOptimizer from configure_optimizers")
    return [optimizer.resample(epoch) for optimizer in found]
