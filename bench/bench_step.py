"""Whole training steps of the nets, for every method: FLOPs, four memory numbers and what was predicted, time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trady_triton.bench.config import RESULTS, Mode, nets_of
from trady_triton.bench.grid import run
from trady_triton.bench.methods import in_order
from trady_triton.bench.store import Store
from trady_triton.bench.tables import show_steps, wide_console


def show(store: Store, mode: str, console: Console) -> None:
    """Print the tables, net by net."""
    for net in nets_of(mode):
        show_steps(console, in_order(row for row in store.rows.values() if row["net"] == net.name))


def main(
    mode: Mode = "cpu",
    minutes: Annotated[float, typer.Option(help="Cases that do not start before are left for the next run.")] = 8.0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure whole training steps."""
    console = wide_console()
    show(run(mode, minutes, out, console, ("step",))["step"], mode, console)


if __name__ == "__main__":
    typer.run(main)
