"""`trady study`: the paper's measurements, as CSV, JSON and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from trady_triton.app import study as tables
from trady_triton.app.cli_base import check_file, check_folder, command, note
from trady_triton.app.cli_options import DataFolder, Device
from trady_triton.app.experiment import read_csv, write_csv
from trady_triton.app.planning import pick_device
from trady_triton.app.spec import Spec


@command
def study(
    spec: Annotated[
        Path | None, typer.Argument(help="A grid, as for `trady experiment`; its nets, data and seeds are recorded.")
    ] = None,
    data: DataFolder = Path("."),
    out: Annotated[Path, typer.Option(callback=check_folder, help="Folder of tables, plots and recordings.")] = Path(
        "study"
    ),
    results: Annotated[Path | None, typer.Option(help="results.csv of `trady experiment`, to compare.")] = None,
    ship: Annotated[
        Path | None, typer.Option(callback=check_folder, help="Write the ranking of each net's first recording here.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(callback=check_file, help="Fill the tables of this Markdown page, between markers.")
    ] = None,
    device: Device = None,
) -> None:
    """Measure what the paper measures: tails, rankings of layers and channels, coverage, who beats whom.

    Of --results a copy without the seconds is kept, which say nothing on a machine that did other things too.
    """
    if spec is None and results is None and page is None:
        raise ValueError("nothing to do: give a grid, --results or --page")
    out.mkdir(parents=True, exist_ok=True)
    if spec is not None:
        grid = Spec.load(spec)
        grid.check_files(data)
        say = lambda name, left: note(f"recorded {name}, {left} to go")  # noqa: E731
        runs = tables.record_all(grid, out, str(data), pick_device(device), say)
        _measurements(grid, runs, out)
        if ship is not None:
            tables.ship_rankings(grid, runs, ship)
    if results is not None:
        rows = read_csv(results)
        if not rows or not {"net", "strategy", "accuracy"} <= rows[0].keys():
            raise ValueError(f"{results}: not a results.csv of `trady experiment`")
        _comparisons(rows, out)
    if page is not None:
        from trady_triton.app.study_report import refresh

        refresh(page, out)
    print(f"tables and plots in {out}")


def _measurements(grid: Spec, runs: list[tables.Run], out: Path) -> None:
    from trady_triton.app import study_plots as plots

    plans = tables.planned(grid, runs[0].recording.ranking)
    written = {
        "nets": tables.net_table(runs),
        "tails": tables.tail_table(runs),
        "layers": tables.layer_table(runs),
        "channels": tables.channel_table(runs),
        "coverage": tables.coverage_table(plans),
        "savings": tables.saving_table(plans),
    }
    _write(written, out)
    plots.plot_tails(written["tails"], out / "tails.png")
    if written["layers"]:
        plots.plot_topology(written["layers"], written["channels"], out / "topology.png")
    plots.plot_coverage(written["coverage"], out / "coverage.png")


def _comparisons(rows: list[dict[str, str]], out: Path) -> None:
    from trady_triton.app import study_plots as plots

    written = {"strategies": tables.strategy_table(rows), "comparisons": tables.comparison_table(rows)}
    _write(written, out)
    write_csv(out / "results.csv", [{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    plots.plot_strategies(rows, out / "strategies.png")
    if written["comparisons"]:
        plots.plot_matrix(written["comparisons"], out / "matrix.png")


def _write(written: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Each table as CSV, and all in study.json beside those that are there."""
    path = out / "study.json"
    whole = json.loads(path.read_text()) if path.exists() else {}
    for name, rows in written.items():
        rounded = [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        write_csv(out / f"{name}.csv", rounded)
        whole[name] = rounded
    path.write_text(json.dumps(whole, indent=0) + "\n")
