"""A grid of runs in processes of their own: finished cells are never run again, their rows are one CSV file.

A folder holds `cells/KEY.json`, one finished cell each, written whole or not at all, and `results.csv`, all of them.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from trady_triton.app.cell import Record, run_cell
from trady_triton.app.spec import Cell
from trady_triton.serial import written_whole

_device = "cpu"


def run_grid(
    cells: Sequence[Cell],
    out: Path,
    data_folder: str,
    *,
    devices: Sequence[str],
    threads: int,
    on_cell: Callable[[Record, int], None] = lambda row, running: None,
) -> list[Record]:
    """Run what is not finished, one process a device at a time, and return the rows of all cells in order.

    Args:
        cells: the grid.
        out: its folder; what it holds of other grids stays, and takes no part.
        data_folder: where the files of nets and data lie.
        devices: one worker process each, such as ["cpu", "cpu"] or ["cuda:0", "cuda:1"].
        threads: of torch, in each process.
        on_cell: told each row as it is finished, and how many cells are still to come.

    Raises:
        RuntimeError: a worker died; what it was at starts anew next time.
        ValueError: a cell cannot be run; the message names it. What is finished stays.
    """
    (out / "cells").mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in cells if not _file(out, cell).exists()]
    if todo:
        _run(todo, out, data_folder, devices, threads, on_cell)
    rows = [json.loads(_file(out, cell).read_text()) for cell in cells]
    write_csv(out / "results.csv", rows)
    return rows


def finished(cells: Sequence[Cell], out: Path) -> list[Cell]:
    """The cells whose results are in the folder."""
    return [cell for cell in cells if _file(out, cell).exists()]


def write_csv(path: Path, rows: Sequence[Record]) -> None:
    """Rows as CSV, one column for each key, in the order in which keys first come."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with written_whole(path) as scratch, scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, all values as text.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _run(
    todo: Sequence[Cell],
    out: Path,
    data_folder: str,
    devices: Sequence[str],
    threads: int,
    on_cell: Callable[[Record, int], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    names = context.Queue()
    for name in devices:
        names.put(name)
    with ProcessPoolExecutor(len(devices), context, _start, (names, threads)) as pool:
        running: dict[Future[Record], Cell] = {pool.submit(_work, cell, data_folder): cell for cell in todo}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    cell = running.pop(future)
                    row = _result(cell, future)
                    _finish(out, cell, row)
                    on_cell(row, len(running))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _result(cell: Cell, future: Future[Record]) -> Record:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError("a worker died, of too little memory perhaps; the same command goes on") from error
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        raise ValueError(f"cell {cell.key}: {error}") from error


def _start(names: Any, threads: int) -> None:
    """Give this worker its device."""
    global _device
    _device = names.get()
    torch.set_num_threads(threads)


def _work(cell: Cell, data_folder: str) -> Record:
    return run_cell(cell, data_folder, _device)


def _finish(out: Path, cell: Cell, row: Record) -> None:
    with written_whole(_file(out, cell)) as scratch:
        scratch.write_text(json.dumps(row) + "\n")


def _file(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.key}.json"
