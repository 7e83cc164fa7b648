"""The equal-memory view: for each method a curve of peak memory against step time over micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trady_triton.bench.config import RESULTS, device_of, nets_of, results_folder, settings
from trady_triton.bench.equal_memory import show_verdicts
from trady_triton.bench.nets import Net
from trady_triton.bench.runner import Case, Runner
from trady_triton.bench.store import Store
from trady_triton.bench.tables import wide_console

# TraDy, its pool trained dense and the last blocks decide; the others come after them, if the time suffices.
DECIDING = ("trady-lean", "trady", "pool", "pool-ckpt", "last", "last-lean")
OTHERS = ("trady-small", "full", "full-ckpt", "head")


def micro_batches(batch: int) -> list[int]:
    """The batch, its half, ... and 1."""
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def cases_of(nets: list[Net], budgets: tuple[str, ...], repeats: int) -> list[Case]:
    """The grid: net x method x micro-batch."""
    return [Case(net, method, budgets, repeats, size)
            for methods in (DECIDING, OTHERS)
            for net in nets for size in micro_batches(net.batch) for method in methods]  # fmt: skip


def run(mode: str, minutes: float, out: Path = RESULTS, console: Console | None = None) -> Store:
    """Run the grid of a mode, or go on with it."""
    content = settings(mode)
    cases = cases_of(nets_of(mode, content["pareto"]), tuple(content["budgets"]), content["pareto_repeats"])
    store = Store(results_folder(mode, out) / "pareto.json", device_of(mode))
    store.keep({case.name for case in cases})
    with Runner(store, console or Console(), minutes, "equal memory") as runner:
        runner.run(cases)
    return store


def main(
    mode: Annotated[str, typer.Option(help="cpu, quick or cuda.")] = "cpu",
    minutes: Annotated[float, typer.Option(help="Cases that do not start before are left for the next run.")] = 5.0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure peak memory against time."""
    console = wide_console()
    store = run(mode, minutes, out, console)
    show_verdicts(console, list(store.rows.values()))


if __name__ == "__main__":
    typer.run(main)
