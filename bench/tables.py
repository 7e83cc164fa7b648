"""Tables of results: for the terminal by rich, for files in Markdown. Numbers come from rows, nowhere else."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
STEP_COLUMNS = ("method", "B_mem KiB", "kept MiB", "predicted", "peak MiB", "predicted", "inference MiB",
                "forward, dX, dW GFLOP", "time / full", "gate")  # fmt: skip


def step_cells(row: Row) -> list[str]:
    """One row of a table of steps: B_mem, bytes kept and peak, each with its prediction, floor, FLOPs, time."""
    flops = [row.get(f"{kind}_flops") for kind in ("forward", "dgrad", "wgrad")]
    return [
        row["label"],
        f"{row['budget_bytes'] / 1024:,.0f}" if has_budget(row) else "-",
        mib(row["kept_bytes"]),
        mib(row.get("predicted_kept_bytes")),
        mib(row["peak_bytes"]),
        mib(row.get("predicted_peak_bytes")),
        mib(row["inference_bytes"]),
        ", ".join(gflop(count) for count in flops) if None not in flops else "-",
        f"{row['ratio']:.2f}",
        gate_cell(row["gate"]),
    ]


def has_budget(row: Row) -> bool:
    """Whether its plan has a budget that binds: that of whole blocks has none."""
    return row.get("budget_bytes") is not None and row["budget_bytes"] < 1 << 40


def gate_cell(gate: Row) -> str:
    """The error of the gradients; of an approximation as it is run."""
    if gate["working_error"] is not None:
        return f"gradient off by {gate['working_error']:.0%}"
    return f"{gate['error']:.0e}" if gate["error"] else "0"


def wide_console() -> Console:
    """Standard output; where it is no terminal, lines are long enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else 170)


def show_steps(console: Console, rows: Sequence[Row]) -> None:
    """Print the rows of one net, and below why some have no numbers."""
    console.print(step_table(rows))
    for row in rows:
        if row["status"] != "ok":
            console.print(f"  {why_not(row)}", highlight=False, soft_wrap=True)


def why_not(row: Row) -> str:
    """A row without numbers, in words."""
    return f"{row['label']}: {row['status']}, {row['why']}"


def step_table(rows: Sequence[Row]) -> Table:
    """The measured rows of one net for the terminal."""
    first = rows[0]
    title = (f"{first['net']}, batch {first['batch']}, {first['image_size']} px, {first['device']}"
             f"{', autocast ' + first['autocast'] if first['autocast'] else ''}")  # fmt: skip
    table = Table(title=title, title_style="bold", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for position, column in enumerate(STEP_COLUMNS):
        table.add_column(column, justify="left" if position in (0, len(STEP_COLUMNS) - 1) else "right")
    for row in rows:
        if row["status"] == "ok":
            table.add_row(*step_cells(row))
    return table


def spread(rows: Iterable[Row]) -> str:
    """How far apart the rounds of a row are, in words."""
    rounds = [[a / b for a, b in zip(row["ms"], row["full_ms"], strict=True)] for row in rows if row["status"] == "ok"]
    apart = sorted(max(ratios) / min(ratios) - 1 for ratios in rounds if len(ratios) > 1)
    if not apart:
        return "Every time was taken once."
    return (f"The two or more rounds of a row lie {statistics.median(apart):.0%} apart in the middle row, "
            f"{apart[-1]:.0%} in the widest of {len(apart)}.")  # fmt: skip


def origin(content: Row) -> str:
    """Device, versions, commit and date of results, and a warning where other work disturbed the times."""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items()
                         if number and name in ("torch", "timm", "triton"))  # fmt: skip
    busy = "" if content["load"] <= content["threads"] + 1 else (
        f" **Other work ran on the machine (load {content['load']}): bytes, FLOPs and gates are exact all the same, "
        "times are noisy.**"
    )  # fmt: skip
    return (f"{content['device']}, {content['threads']} threads, {versions}, commit {content['commit']}, "
            f"{content['date']}.{busy}")  # fmt: skip


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def mib(nbytes: int | None) -> str:
    """Bytes in MiB: 0.08, 41.6, 2,257; nothing known is a dash."""
    return "-" if nbytes is None else short(nbytes / 2**20)


def gflop(count: int) -> str:
    """FLOPs in 1e9."""
    return short(count / 1e9)


def short(value: float) -> str:
    """Three or more digits."""
    return f"{value:,.{2 if value < 10 else 1 if value < 1000 else 0}f}"
