"""Whole training steps of the nets, for every method: FLOPs, four memory numbers and what was predicted, time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trady_triton.bench.config import RESULTS, device_of, nets_of, results_folder, settings
from trady_triton.bench.methods import METHODS, in_order
from trady_triton.bench.runner import Case, Runner
from trady_triton.bench.store import Store
from trady_triton.bench.tables import show_steps, wide_console

LEFT_OUT = "left out on this net: it compiles for minutes; settings.json says where it runs"


def cases_of(mode: str, names: list[str] | None = None, methods: list[str] | None = None) -> list[Case]:
    """The grid of a mode; of every net the methods that matter most come first, in case the time does not suffice."""
    content = settings(mode)
    repeats = {name: sizes.get("repeats", content["repeats"]) for name, sizes in content["nets"].items()}
    cases = [
        Case(net, method, tuple(content["budgets"]), repeats[net.name])
        for net in nets_of(mode, names)
        for method in methods or METHODS
    ]
    return sorted(cases, key=lambda case: (not METHODS[case.method].is_key, METHODS[case.method].is_costly))


def run(mode: str, minutes: float, out: Path = RESULTS, console: Console | None = None) -> Store:
    """Run the grid of a mode, or go on with it."""
    console = console or Console()
    store = Store(results_folder(mode, out) / "step.json", device_of(mode))
    cases, compiled = cases_of(mode), settings(mode)["compiled"]
    store.keep({case.name for case in cases})
    left_out = [case for case in cases if METHODS[case.method].is_costly and case.net.name not in compiled]
    for case in left_out:
        row = {**case.net.described(), "method": case.method, "label": METHODS[case.method].label}
        store.put(case.name, case.inputs, row | {"status": "unavailable", "why": LEFT_OUT})
    with Runner(store, console, minutes, "steps") as runner:
        runner.run([case for case in cases if case not in left_out])
    return store


def show(store: Store, mode: str, console: Console) -> None:
    """Print the tables, net by net."""
    for net in nets_of(mode):
        show_steps(console, in_order(row for row in store.rows.values() if row["net"] == net.name))


def main(
    mode: Annotated[str, typer.Option(help="cpu, quick or cuda.")] = "cpu",
    minutes: Annotated[float, typer.Option(help="Cases that do not start before are left for the next run.")] = 8.0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure whole training steps."""
    console = wide_console()
    show(run(mode, minutes, out, console), mode, console)


if __name__ == "__main__":
    typer.run(main)
