"""The equal-memory view: for each method a curve of peak memory against step time over micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trady_triton.bench.config import RESULTS, Mode
from trady_triton.bench.equal_memory import show_verdicts
from trady_triton.bench.grid import run
from trady_triton.bench.tables import wide_console


def main(
    mode: Mode = "cpu",
    minutes: Annotated[float, typer.Option(help="Cases that do not start before are left for the next run.")] = 5.0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure peak memory against time."""
    console = wide_console()
    store = run(mode, minutes, out, console, ("pareto",))["pareto"]
    show_verdicts(console, list(store.rows.values()))


if __name__ == "__main__":
    typer.run(main)
