"""`make bench`: everything of a mode, one benchmark after another, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trady_triton.bench import bench_step
from trady_triton.bench.config import RESULTS, nets_of
from trady_triton.bench.tables import show_steps


def main(
    mode: Annotated[str, typer.Option(help="cpu, quick or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure whole steps."""
    console = Console()
    store = bench_step.run(mode, 8.0, out, console)
    for net in nets_of(mode):
        show_steps(console, [row for row in store.rows.values() if row["net"] == net.name])


if __name__ == "__main__":
    typer.run(main)
