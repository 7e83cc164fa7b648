"""`make bench`: the benchmarks of a mode, one after another, then the report and the tables of the README."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trady_triton.bench import bench_bars, bench_memory, bench_step, grid, ops_table, report
from trady_triton.bench.config import RESULTS, Mode, device_of, results_folder, settings
from trady_triton.bench.equal_memory import show_verdicts
from trady_triton.bench.readme import fill
from trady_triton.bench.tables import wide_console

README = Path("README.md")


def main(
    mode: Mode = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure whole steps, the equal-memory view and the kernels. What was measured before is not run again."""
    console, content, folder = wide_console(), settings(mode), results_folder(mode, out)
    if mode == "cpu":  # exact counts, the same on every machine
        bench_memory.run(out, console)
    stores = grid.run(mode, content["minutes"], out, console)
    bars = bench_bars.run(mode, out, console)
    ops_table.run(folder, device_of(mode), content["ops_batch"])
    bench_step.show(stores["step"], mode, console)
    console.print(bench_bars.bars_table({"cases": bars.rows}), highlight=False, soft_wrap=True, markup=False)
    show_verdicts(console, list(stores["pareto"].rows.values()))
    console.print(f"report: {report.write(folder)}", highlight=False)
    if mode != "quick" and README.exists() and out == RESULTS and fill(README, out):
        console.print(f"{README}: tables written", highlight=False)


if __name__ == "__main__":
    typer.run(main)
