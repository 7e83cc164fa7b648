"""Lightning: its Trainer with the callback."""

import logging

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning", reason="lightning is not installed (extra lightning)")

from integrations.twin import hand_written
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from toys import toy_batches, toy_net, toy_plan

from trady_triton import TraDyOptimizer, apply_plan
from trady_triton.integrations.lightning import TraDyCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")  # of few workers and missing loggers


class Task(LightningModule):
    """The toy network; `draws` holds the draw that each step was trained with."""

    def __init__(self, plan, make=TraDyOptimizer, **options):
        super().__init__()
        self.net = apply_plan(toy_net(), plan)
        self.make, self.options = make, options
        self.draws = []

    def training_step(self, batch, index):
        x, y = batch
        self.draws.append(self.optimizers().optimizer.epoch)
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return self.make(self.net.parameters(), lr=0.1, **self.options)


def fit(task, ckpt_path=None, callbacks=(), **options):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=options.pop("max_epochs", 2),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=[TraDyCallback(), *callbacks],
        **options,
    )
    loader = torch.utils.data.DataLoader(toy_batches(6), batch_size=None)
    trainer.fit(task, loader, ckpt_path=ckpt_path, **({"weights_only": True} if ckpt_path else {}))
    return task


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 3}], ids=str)
def test_a_fit_equals_a_loop_written_by_hand(options):
    plan = toy_plan(toy_net())
    task = fit(Task(plan), **options)
    expected = hand_written(plan, 6, options.get("accumulate_grad_batches", 1), options.get("gradient_clip_val"))
    assert task.draws == [0] * 6 + [1] * 6
    for name, tensor in task.net.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-12, atol=1e-14)


def test_channels_are_drawn_by_step_and_not_inside_an_accumulation_window():
    task = fit(Task(toy_plan(toy_net()), resample_every=2), accumulate_grad_batches=2)
    assert task.draws == [0] * 4 + [1] * 4 + [2] * 4  # 2 steps of 2 batches each


class Overflow(Task):
    """The gradient of every epoch's last batch is infinite."""

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return loss * float("inf") if index == 5 else loss


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"resample_every": 2}], ids=str)
def test_a_scaler_skips_the_last_step_of_an_epoch_and_training_goes_on(options):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plan = toy_plan(toy_net())
    task = fit(Overflow(plan, **options), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert task.draws == ([0] * 2 + [1] * 2 + [2] * 3 + [3] * 2 + [4] * 2 + [5] if "resample_every" in options
                          else [0] * 6 + [1] * 6)  # fmt: skip
    assert scaler.get_scale() == 256.0
    assert all(parameter.isfinite().all() for parameter in task.net.parameters())


class Stop(Callback):
    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == 9:  # checkpoints are saved after other callbacks ran
            raise KeyboardInterrupt


@pytest.mark.parametrize("every", ["epoch", 5])
def test_a_run_stopped_in_mid_epoch_trains_the_same_channels(tmp_path, every):
    plan = toy_plan(toy_net())
    whole = fit(Task(plan, resample_every=every))
    saved = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Task(plan, resample_every=every), callbacks=[saved, Stop()])
    resumed = fit(Task(plan, resample_every=every), ckpt_path=tmp_path / "step=8.ckpt")
    assert resumed.draws == whole.draws[8:]


def test_another_optimizer_is_refused():
    task = Task(toy_plan(toy_net()), make=torch.optim.SGD)
    with pytest.raises(TypeError, match="optimizers SGD: wanted a TraDyOptimizer"):
        fit(task)


class DeepSpeedStrategy:
    """By name, like the one whose package is not installed."""


def test_deepspeed_is_refused_before_anything_runs():
    trainer = type("T", (), {"strategy": DeepSpeedStrategy()})()
    with pytest.raises(ValueError, match="strategy DeepSpeedStrategy"):
        TraDyCallback().setup(trainer, None, "fit")
