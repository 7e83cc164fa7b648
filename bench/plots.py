"""Peak memory against step time: a curve a method over micro-batches, the Pareto front marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from trady_triton.bench.equal_memory import front, points
from trady_triton.bench.tables import Row


def plot_pareto(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of one net into a PNG."""
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.subplots()
    measured = points(rows)
    for index, method in enumerate(dict.fromkeys(row["method"] for row in measured)):
        curve = sorted(points(measured, (method,)), key=lambda row: row["peak_bytes"])
        axes.plot([row["peak_bytes"] / 2**20 for row in curve], [row["ratio"] for row in curve], "-",
                  marker="os^vDP*Xhd"[index % 10], markersize=5, linewidth=1, label=curve[0]["label"])  # fmt: skip
    best = front(measured)
    axes.plot([row["peak_bytes"] / 2**20 for row in best], [row["ratio"] for row in best], "o", markersize=13,
              fillstyle="none", color="black", label="Pareto front")  # fmt: skip
    first = measured[0]
    axes.set(xscale="log", yscale="log", xlabel="peak beyond weights and batch, MiB",
             ylabel="time of a step / full fine-tuning", title=f"{first['net']}, batch {first['batch']}, "
             f"{first['image_size']} px, {first['device']}: micro-batches down from the batch")  # fmt: skip
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
