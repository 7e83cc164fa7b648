"""Checkpoints of a run: written whole or not at all, read without running anything that they contain."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from trady_triton.serial import written_whole

FORMAT = "trady_triton.checkpoint"
VERSION = 3
PREVIOUS = ".previous"


@dataclass(frozen=True)
class Checkpoint:
    """A run between two steps: `step` steps of `epoch` are done, and `tally` is what they summed up for the log.

    `run` is the run's configuration, plain values.
    """

    run: dict[str, Any]
    epoch: int
    step: int
    tally: dict[str, Any]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    random: dict[str, Any]

    def __post_init__(self) -> None:
        for name, kind in (("run", dict), ("epoch", int), ("step", int), ("tally", dict)):
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"{name} is a {type(value).__name__}")

    @classmethod
    def take(
        cls, run: dict[str, Any], model: nn.Module, optimizer: Optimizer, scheduler: Scheduler, **progress: Any
    ) -> Checkpoint:
        """The state as it is now; the tensors are the run's own, so save before the next step.

        `progress`: epoch, step and tally.
        """
        return cls(
            run=run,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            scheduler=scheduler.state_dict(),
            random=random_state(),
            **progress,
        )

    def restore(self, model: nn.Module, optimizer: Optimizer, scheduler: Scheduler) -> None:
        """Put everything back.

        Raises:
            ValueError: the checkpoint is damaged, or of another model or another plan.
        """
        try:
            optimizer.load_state_dict(self.optimizer)  # first, as it refuses another plan and changes nothing then
            model.load_state_dict(self.model)
            scheduler.load_state_dict(self.scheduler)
            set_random_state(self.random)
        except RuntimeError as error:
            raise ValueError(f"the checkpoint is of another model ({shorten(str(error), 300)})") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the checkpoint is damaged ({error!r})") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file and keep the one before beside it; an interrupted write leaves both as they were.

        Raises:
            OSError: it could not be written, for want of space perhaps.
        """
        try:
            with written_whole(path, keep=PREVIOUS) as scratch:
                torch.save({"format": FORMAT, "version": VERSION, **vars(self)}, scratch)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{path} could not be written, is the disk full? ({error})") from error

    @classmethod
    def load_newest(cls, path: str | os.PathLike[str], note: Callable[[str], None] = lambda text: None) -> Checkpoint:
        """Read `path`, or, where it is gone or damaged, the file before, and say so to `note`.

        A damaged file is renamed to .damaged, so that the next `save` does not keep it in the place of the good one.

        Raises:
            FileNotFoundError, ValueError: neither can be read; the message is that of `path`.
        """
        try:
            return cls.load(path)
        except (FileNotFoundError, ValueError) as error:
            older = previous(path)
            try:
                checkpoint = cls.load(older)
            except (FileNotFoundError, ValueError):
                raise error from None
            if (damaged := Path(path)).exists():
                os.replace(damaged, damaged.with_name(damaged.name + ".damaged"))
            note(f"{error}; going back to {older}")
            return checkpoint

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read a file of `save`, its tensors on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, damaged, or something else.
        """
        content = load_tensors(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path}: not a checkpoint of this program")
        if (version := content.get("version")) != VERSION:
            raise ValueError(f"{path}: checkpoint version {version!r}, this program reads version {VERSION}")
        try:
            return cls(**{key: value for key, value in content.items() if key not in ("format", "version")})
        except TypeError as error:
            raise ValueError(f"{path}: the checkpoint is damaged ({error})") from error


def previous(path: str | os.PathLike[str]) -> Path:
    """Where `Checkpoint.save` keeps the file before."""
    return Path(f"{os.fspath(path)}{PREVIOUS}")


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """`torch.load` of tensors and plain values, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:  # since the question: it is being replaced
        raise FileNotFoundError(f"{path}: no such file") from error
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: truncated, damaged, or no file of tensors ({type(error).__name__})") from error


def random_state() -> dict[str, Any]:
    """State of the process-wide generators that dropout and transforms draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def set_random_state(state: dict[str, Any]) -> None:
    """Put a `random_state()` back; states of GPUs that this machine lacks are left out."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)
