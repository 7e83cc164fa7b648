"""One fine-tuning run in one folder: plan.json, log.jsonl (a line an epoch), checkpoint.pt, model.safetensors.

A run that was stopped goes on bit for bit on a CPU: the order of the data and the draws are functions of the epoch, and
a checkpoint holds everything else.
"""

from __future__ import annotations

import json
import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from trady_triton import Plan
from trady_triton.app.checkpoint import Checkpoint, previous
from trady_triton.app.loader import Batches
from trady_triton.app.train import (
    METHODS,
    OPTIMIZERS,
    Tally,
    evaluate,
    make_optimizer,
    make_scheduler,
    start_epoch,
    train_epoch,
)
from trady_triton.serial import written_whole

CHECKPOINT, LOG, MODEL, PLAN = "checkpoint.pt", "log.jsonl", "model.safetensors", "plan.json"


@dataclass(frozen=True)
class Settings:
    """What decides the course of a run, its first weights aside; a resumed run must have the same.

    `lr` is the paper's. Clipping is not in the paper, but with frozen normalisation plain SGD easily diverges without.
    `warmup` is the share of all steps in which the learning rate rises to `lr`, `planning` what the plan was made of.
    """

    net: str
    data: str
    method: str = "trady"
    epochs: int = 10
    lr: float = 0.125
    batch_size: int = 32
    image_size: int = 224
    optimizer: str = "sgd"
    weight_decay: float = 0.0
    max_grad_norm: float | None = 2.0
    warmup: float = 0.1
    augment: bool = False
    seed: int = 0
    planning: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--method {self.method!r}: wanted one of {', '.join(METHODS)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"--optimizer {self.optimizer!r}: wanted one of {', '.join(OPTIMIZERS)}")
        for name in ("epochs", "batch_size", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: wanted at least 1")
        for name in ("lr", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value}: wanted a finite number of at least 0")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"--warmup {self.warmup}: wanted a share of the steps, from 0 to 1")

    def flat(self) -> dict[str, Any]:
        """Everything by name, the options of the plan too."""
        return {**self.planning, **{name: value for name, value in asdict(self).items() if name != "planning"}}


@dataclass(frozen=True)
class Interval:
    """How often a run is saved inside an epoch: after so many steps, after so many seconds, or never."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str) -> Interval:
        """ "200" steps; "90s", "10min", "1h"; or "never".

        Raises:
            ValueError: the text is none of these.
        """
        if text == "never":
            return cls()
        if match := re.fullmatch(r"([1-9]\d*)(s|min|h)?", text):
            number, unit = int(match[1]), match[2]
            return cls(seconds=number * {"s": 1, "min": 60, "h": 3600}[unit]) if unit else cls(steps=number)
        raise ValueError(f"--checkpoint-every {text!r}: wanted a number of steps, a time such as 10min, or never")

    def is_over(self, steps: int, seconds: float) -> bool:
        """Whether a checkpoint is due that many steps and seconds after the last one."""
        return (self.steps is not None and steps >= self.steps) or (
            self.seconds is not None and seconds >= self.seconds
        )


Record = dict[str, Any]


class Run:
    """A model on its way through the epochs of its settings.

    `epoch` and `step` say how far it is: that many epochs, and that many steps of the next one, are done; `saved` says
    the same of the checkpoint in the folder, None where this run wrote or read none.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        settings: Settings,
        out: Path,
        plan: Plan | None = None,
        save_every: Interval = Interval(),
    ) -> None:
        """Sets up the model for the method. Nothing is read or written yet.

        There is a checkpoint after each epoch in any case; `save_every` adds some inside. It does not change what is
        trained.

        Raises:
            ValueError: the plan is missing or was made for another model, or a setting is out of its range.
        """
        self.model, self.batches, self.settings, self.out, self.plan = model, batches, settings, out, plan
        self.optimizer = make_optimizer(
            model,
            settings.method,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            plan=plan,
            optimizer=settings.optimizer,
        )
        steps = settings.epochs * batches.train_steps
        self.scheduler = make_scheduler(self.optimizer, steps=steps, warmup_steps=round(settings.warmup * steps))
        self.save_every = save_every
        self.epoch = self.step = 0
        self.tally = Tally()
        self.saved: tuple[int, int] | None = None
        self.saved_at = time.monotonic()
        self.records: list[Record] = []
        torch.manual_seed(settings.seed)

    def resume(self, note: Callable[[str], None] = lambda text: None) -> None:
        """Go back to where the newest checkpoint in the folder that can be read was taken.

        Args:
            note: told where the newest was damaged and an older one was taken.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: none can be read, or it is of a run with other settings.
        """
        saved = Checkpoint.load_newest(self.out / CHECKPOINT, note)
        for name, value in self._identity().items():
            if (before := saved.run.get(name)) != value:
                raise ValueError(f"{self.out / CHECKPOINT}: that run had {name} = {before!r}, this one has {value!r}")
        saved.restore(self.model, self.optimizer, self.scheduler)
        self.saved = self.epoch, self.step = saved.epoch, saved.step
        self.tally = Tally(**saved.tally)
        self.records = [record for record in read_log(self.out / LOG) if record["epoch"] < self.epoch]

    def train(
        self,
        on_step: Callable[[Tally], None] = lambda tally: None,
        on_epoch: Callable[[Record], None] = lambda record: None,
    ) -> list[Record]:
        """Train to the last epoch, with a checkpoint after each; the records of all epochs.

        Raises:
            KeyboardInterrupt: Ctrl-C, after the step under way was completed and saved. A second Ctrl-C stops at once
                and leaves the checkpoint of before.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        if self.saved is None:  # a checkpoint of an older run would not fit this one's plan and log
            for path in (self.out / CHECKPOINT, previous(self.out / CHECKPOINT)):
                path.unlink(missing_ok=True)
        if self.plan is not None:
            self.plan.save(self.out / PLAN)
        with interrupt_deferred() as interrupted:
            while self.epoch < self.settings.epochs:
                on_epoch(self._train_epoch(on_step, interrupted))
                if interrupted() and self.epoch < self.settings.epochs:
                    raise KeyboardInterrupt
        with written_whole(self.out / MODEL) as scratch:
            save_model(self.model, str(scratch))
        return self.records

    def save(self) -> None:
        """Write the checkpoint."""
        progress = {"epoch": self.epoch, "step": self.step, "tally": asdict(self.tally)}
        state = Checkpoint.take(self._identity(), self.model, self.optimizer, self.scheduler, **progress)
        state.save(self.out / CHECKPOINT)
        self.saved, self.saved_at = (self.epoch, self.step), time.monotonic()

    def _identity(self) -> dict[str, Any]:
        """What a run that goes on with a checkpoint must have in common; its data may have moved."""
        return {**self.settings.flat(), "data": self.batches.data.fingerprint}

    def _train_epoch(self, on_step: Callable[[Tally], None], interrupted: Callable[[], bool]) -> Record:
        def after_step(tally: Tally) -> None:
            self.step, self.tally = self.step + 1, tally
            on_step(tally)
            if self.step == self.batches.train_steps:
                return
            stop = interrupted()
            if stop or self._is_due():
                self.save()
            if stop:
                raise KeyboardInterrupt

        start_epoch(self.optimizer, self.epoch)
        train_epoch(
            self.model,
            self.optimizer,
            self.batches.train(self.epoch, self.step),
            nn.functional.cross_entropy,
            scheduler=self.scheduler,
            first_update=self.epoch * self.batches.train_steps + self.step,
            max_grad_norm=self.settings.max_grad_norm,
            micro_batch=None if self.plan is None else self.plan.micro_batch,
            tally=self.tally,
            on_step=after_step,
        )
        self.records.append(self._record())
        self.epoch, self.step, self.tally = self.epoch + 1, 0, Tally()
        write_log(self.out / LOG, self.records)
        self.save()
        return self.records[-1]

    def _is_due(self) -> bool:
        """Whether a checkpoint inside the epoch is due."""
        epoch, step = self.saved or (0, 0)
        since = (self.epoch - epoch) * self.batches.train_steps + self.step - step
        return self.save_every.is_over(since, time.monotonic() - self.saved_at)

    def _record(self) -> Record:
        """A line of the log."""
        return {
            "epoch": self.epoch,
            "loss": self.tally.loss,
            "train_accuracy": self.tally.accuracy,
            "test_accuracy": evaluate(self.model, self.batches.test()),
            "lr": self.optimizer.param_groups[0]["lr"],
            "steps": self.tally.steps,
            "seconds": round(self.tally.seconds, 3),
        }


@contextmanager
def interrupt_deferred() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C only be noted, so that a step is never cut in two; the second acts as usual."""
    asked = False

    def note(signum: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def read_log(path: Path) -> list[Record]:
    """The records of a log, none where there is no file.

    Raises:
        ValueError: a line is not JSON.
    """
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the log is damaged ({error})") from error


def write_log(path: Path, records: list[Record]) -> None:
    """One line of JSON a record; lines of epochs that are trained again after a resume are replaced."""
    with written_whole(path) as scratch:
        scratch.write_text("".join(json.dumps(record) + "\n" for record in records))
