"""`trady experiment`: a grid of fine-tuning runs, resumable, in one CSV file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trady_triton.app.cell import Record
from trady_triton.app.cli_base import check_folder, command, note
from trady_triton.app.cli_options import DataFolder
from trady_triton.app.experiment import finished, run_grid
from trady_triton.app.planning import pick_device
from trady_triton.app.spec import Spec


@command
def experiment(
    spec: Annotated[Path, typer.Argument(help="A YAML file: nets, data, budgets, strategies, lrs, seeds, protocol.")],
    data: DataFolder = Path("."),
    out: Annotated[
        Path | None,
        typer.Option(callback=check_folder, help="Folder of the results; runs/NAME-OF-THE-SPEC by default."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on the CPU; on GPUs there is one for each.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; all GPUs by default, else the CPU.")] = None,
) -> None:
    """Run a grid of nets x data sets x budgets x strategies x seeds; a second call runs what is left."""
    grid = Spec.load(spec)
    grid.check_files(data)
    cells = list(grid.cells())
    folder = out or Path("runs") / spec.stem
    if done := finished(cells, folder):
        note(f"{len(done)} of {len(cells)} cells are finished already")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("cells", total=len(cells), completed=len(done))

        def show(row: Record, left: int) -> None:
            progress.update(task, completed=len(cells) - left)
            accuracy = "diverged" if row["accuracy"] is None else f"{row['accuracy']:.2%}"
            progress.console.print(
                f"{row['net']} {row['data']} {row['budget'] or ''} {row['strategy']} lr {row['lr']:g} "
                f"seed {row['seed']}: {accuracy}, {row['seconds']:.0f} s",
                highlight=False,
            )

        run_grid(cells, folder, str(data), devices=_devices(device, workers), threads=threads, on_cell=show)
    print(f"{len(cells)} rows in {folder / 'results.csv'}")


def _devices(name: str | None, workers: int) -> list[str]:
    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [str(device)] * (workers if device.type == "cpu" else 1)
