"""What the demo found: its numbers, their table, and what they do and do not show."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from trady_triton.app.step_cost import StepCost

_KIB, _MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Method:
    """A way to train. `effort` is the time of a step over that of a forward: a guess, for the time left."""

    label: str
    method: str
    lr: float
    effort: float
    budget: str | None = None


@dataclass(frozen=True)
class Result:
    """A method's cost of a step, and its training: accuracy and loss of each epoch, median seconds of a step."""

    method: Method
    cost: StepCost
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]
    step_seconds: float
    budget_bytes: int | None


@dataclass(frozen=True)
class Report:
    """All results; `inference_peak_bytes` is the peak of a forward without gradients."""

    results: tuple[Result, ...]
    inference_peak_bytes: int
    ranking_seconds: float
    seconds: float
    test_images: int


def results_table(report: Report, title: str) -> Table:
    """One row a method; all but the accuracy is of one training step, memory is beyond weights and batch."""
    floor = f"peak of a forward without gradients, the floor of every step: {mib(report.inference_peak_bytes)} MiB"
    table = Table(
        title=f"{title}\n{floor}", title_style="none", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("method", no_wrap=True)
    headings = ("test\naccuracy", "kept for\nbackward\nMiB", "peak\nmemory\nMiB", "dW\nMFLOP", "step\ns",
                "budget\nKiB", "of it\nused\nKiB")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for result in report.results:
        cost, budget = result.cost, result.budget_bytes
        table.add_row(
            result.method.label,
            f"{result.accuracy[-1]:.1%}",
            mib(cost.kept_bytes),
            mib(cost.peak_bytes),
            _short(cost.wgrad_flops / 1e6),
            f"{result.step_seconds:.3f}",
            "-" if budget is None else f"{budget / _KIB:,.0f}",
            "-" if budget is None else f"{cost.channel_bytes / _KIB:,.1f}",
        )
    return table


def closing_lines(report: Report) -> list[str]:
    """How to read the table, from its own numbers."""
    error = max(
        math.sqrt(result.accuracy[-1] * (1 - result.accuracy[-1]) / report.test_images) for result in report.results
    )
    epochs = len(report.results[0].accuracy)
    lines = [
        f"Accuracy after {epochs} epochs on {report.test_images} test images, one seed: differences below "
        f"{2 * error:.0%} say nothing. Learning rates: "
        + ", ".join(f"{result.method.label} {result.method.lr:g}" for result in report.results) + ".",
        "Budget: compact inputs and compact gradients of the drawn channels; used: the most that was measured in any "
        "epoch. The head is trained beside it. Memory and FLOPs are those of the epoch that keeps most.",
    ]  # fmt: skip
    for result in report.results:
        if result.budget_bytes is not None:
            kept, kinds = result.cost.kept_bytes, result.cost.kept_by_kind
            lines.append(
                f"{result.method.label} keeps {mib(kept)} MiB for the backward: "
                + ", ".join(f"{size / kept:.0%} {kind}" for kind, size in kinds.items() if size / kept >= 0.005) + "."
            )  # fmt: skip
    return lines


def mib(nbytes: int) -> str:
    """Bytes in MiB, as a number."""
    return _short(nbytes / _MIB)


def _short(value: float) -> str:
    """Three or more digits: 0.08, 41.6, 2,257."""
    return f"{value:,.{2 if value < 10 else 1 if value < 1000 else 0}f}"
