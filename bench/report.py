"""The report of a device, in Markdown, from the JSON of its benchmarks; and the tables of the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from trady_triton.bench.bench_bars import DRAWS, ROUNDS, bars_table
from trady_triton.bench.case import MIN_ROUNDS
from trady_triton.bench.config import RESULTS
from trady_triton.bench.equal_memory import TIE, front, points, verdict_table, verdicts
from trady_triton.bench.methods import in_order
from trady_triton.bench.plots import plot_pareto
from trady_triton.bench.readme import fill
from trady_triton.bench.store import KIND
from trady_triton.bench.tables import STEP_COLUMNS, Row, markdown, origin, spread, step_cells, why_not
from trady_triton.serial import read_json, write_json

FILES = "README.md,trady_triton/nn/README.md"
HOW_TO_READ = f"""Memory is beyond the net's own weights and the batch: B_mem is the budget of the plan (compact \
stores and compact gradients of drawn channels); kept is what lives between forward and backward; peak is the most \
that lives at once, gradients, optimizer state, adapters and channel ids included; inference is the peak of a forward \
without gradients, which no training step undercuts. "Predicted" stands after what it predicts, and was computed on \
fake tensors; on CUDA measured peaks are the allocator's. Time is the median of a step's ratios to a step of full \
fine-tuning, both run in turn in one process, in two rounds or, where these are more than {TIE:.0%} apart, in more. \
The last column is the gate: the relative error of the gradients of all that is trained, against plain PyTorch in \
float64 (optimizers: float32); a method that fails it shows no speed."""
ON_BARS = f"""The rival trains the layers that TraDy's epoch has drawn, whole, in plain PyTorch, with all else frozen \
and BatchNorm in eval mode: once as it is, beside lean layers where nothing is recomputed; once under timm's \
checkpointing, beside the blocks that `choose_recompute` picks. All ways take steps in turn, {MIN_ROUNDS} or \
{ROUNDS} in each of {DRAWS} draws, after one that is not timed; the median of the ratios of neighbours counts; their \
range follows it."""
ON_EQUAL_MEMORY = f"""Each method runs at micro-batches from the batch down; times are ratios to full \
fine-tuning of the whole batch. The table takes every peak between the smallest in which TraDy works and twice \
that, wherever an answer changes, and shows the fastest way within it: TraDy, the same pool of layers trained \
dense (with or without timm checkpointing), the last two blocks. Differences below {TIE:.0%} count as a tie. \
With BatchNorm, full fine-tuning in micro-batches is another computation, as its statistics are those of the \
part."""


def report(folder: Path) -> str:
    """Everything that a folder of results holds; plots are drawn beside it."""
    parts = []
    for name, section in (("step", _steps), ("bars", _bars), ("pareto", _pareto), ("ops", _ops)):
        if (folder / f"{name}.json").exists():
            content = read_json(folder / f"{name}.json", KIND)
            if not parts:
                parts.append(_heading(content))
            parts.append(section(content, folder))
    if not parts:
        raise ValueError(f"{folder}: no results; run `make bench`")
    return "\n\n".join(parts) + "\n"


def _heading(content: dict[str, Any]) -> str:
    packages = [f"{name} {number}" for name, number in content["versions"].items() if number]
    return f"# {content['device']}\n\n{origin(content)} Packages: {', '.join(packages)}."


def _steps(content: dict[str, Any], folder: Path) -> str:
    lines = ["## Training steps", "", f"{HOW_TO_READ} {spread(content['cases'].values())}"]
    for net, rows in _by_net(content).items():
        lines += ["", f"### {net}{_sizes(rows[0])}", "",
                  markdown(STEP_COLUMNS, [step_cells(row) for row in rows if row["status"] == "ok"])]  # fmt: skip
        lines += ["", *[f"- {why_not(row)}" for row in rows if row["status"] != "ok"]]
    return "\n".join(lines)


def _bars(content: dict[str, Any], folder: Path) -> str:
    return f"## Steps beside plain PyTorch with the same layers frozen\n\n{ON_BARS}\n\n{bars_table(content)}"


def _pareto(content: dict[str, Any], folder: Path) -> str:
    nets = _by_net(content)
    rows = [row for group in nets.values() for row in group]
    reading = f"{ON_EQUAL_MEMORY} {spread(rows)}"
    lines = ["## Equal memory", "", reading, "", verdict_table(rows), "", *_conclusions(nets)]
    for net, group in nets.items():
        if points(group):
            plot_pareto(group, folder / f"pareto-{net}.png")
            lines += ["", f"![{net}: peak memory against time](pareto-{net}.png)", ""]
            lines += [f"On the Pareto front of {net}: {_front_in_words(group)}."]
    lines += ["", *[f"- {row['net']}, micro-batch {row['micro_batch']}: {why_not(row)}"
                    for row in rows if row["status"] != "ok"]]  # fmt: skip
    return "\n".join(lines)


def _conclusions(nets: dict[str, list[Row]]) -> list[str]:
    """Who wins, net by net, in words that hold the rivals' wins as well."""
    lines = []
    for net, rows in nets.items():
        found = verdicts(rows)
        if not found:
            continue
        wins = [v for v in found if v.winner.startswith("TraDy")]
        text = f"- {net}: TraDy is the faster at {len(wins)} of {len(found)} peaks"
        lost = [v for v in found if not v.winner.startswith("TraDy")]
        if lost:
            text += "; it is not at " + ", ".join(f"{v.peak_bytes / 2**20:.1f} MiB ({v.winner})" for v in lost)
        ahead = [v for v in found if v.last is not None and v.last["ratio"] < v.trady["ratio"] * (1 - TIE)]
        if ahead:
            text += f"; training the last two blocks instead is faster than TraDy at {len(ahead)} of them"
        lines.append(text + ".")
    return lines


def _front_in_words(rows: Sequence[Row]) -> str:
    names: dict[str, list[str]] = {}
    for row in front(rows):
        names.setdefault(row["label"], []).append(str(row["micro_batch"]))
    return "; ".join(f"{label} (micro-batch {', '.join(sizes)})" for label, sizes in names.items())


def _ops(content: dict[str, Any], folder: Path) -> str:
    from trady_triton.bench.ops_table import ops_table

    return "## Kernels\n\n" + ops_table(content)


def _by_net(content: dict[str, Any]) -> dict[str, list[Row]]:
    nets: dict[str, list[Row]] = {}
    for row in content["cases"].values():
        nets.setdefault(row["net"], []).append(row)
    return {net: in_order(rows) for net, rows in nets.items()}


def _sizes(row: Row) -> str:
    autocast = f", autocast {row['autocast']}" if row["autocast"] else ""
    return f", batch {row['batch']}, {row['image_size']} px, {row['device']}{autocast}"


def write(folder: Path) -> Path:
    """Write report.md into a folder of results."""
    path = folder / "report.md"
    path.write_text(report(folder))
    return path


def main(
    results: Annotated[Path, typer.Option(help="Folder of all results.")] = RESULTS,
    files: Annotated[str, typer.Option(help="Files whose tables are filled, with commas.")] = FILES,
    demo: Annotated[Path | None, typer.Option(help="Take over a demo.json of `make demo` first.")] = None,
) -> None:
    """Write the report of every device, and the tables between markers."""
    if demo is not None:
        write_json(results / "demo.json", "demo", read_json(demo, "demo"))
    for folder in sorted(path.parent for path in results.glob("*/step.json")):
        typer.echo(f"{write(folder)} written")
    for name in files.split(","):
        if Path(name).exists() and fill(Path(name), results):
            typer.echo(f"{name}: tables written")


if __name__ == "__main__":
    typer.run(main)
