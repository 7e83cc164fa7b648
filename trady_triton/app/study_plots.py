"""The study's plots, as a paper prints them: tails, layers, channels, coverage, strategies and who beats whom."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trady_triton.app.plots import COLOURS, GREY, MARKERS

Row = dict[str, Any]
File = str | os.PathLike[str]


def plot_tails(rows: Sequence[Row], path: File) -> None:
    """Tail index by epoch: one panel for all gradients together, one for the median layer with the range of layers."""
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    whole, layers = figure.subplots(1, 2, sharey=True)
    for name, colour, marker in zip(_distinct(rows, "data"), COLOURS, MARKERS, strict=False):
        for seed in _distinct(rows, "seed"):
            run = [row for row in rows if (row["data"], row["seed"]) == (name, seed)]
            passed = [row["epoch"] + 1 for row in run]
            label = short(name) if seed == rows[0]["seed"] else None
            line = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1}
            whole.plot(passed, [row["alpha"] for row in run], label=label, **line)
            layers.plot(passed, [row["layers_median"] for row in run], **line)
    epochs = sorted({row["epoch"] + 1 for row in rows})
    ends = [[row for row in rows if row["epoch"] + 1 == epoch] for epoch in epochs]
    layers.fill_between(epochs, [min(row["layers_min"] for row in group) for group in ends],
                        [max(row["layers_max"] for row in group) for group in ends], color=GREY, alpha=0.25,
                        linewidth=0)  # fmt: skip
    for axes, title in ((whole, "all gradients together"), (layers, "layer by layer: median and range")):
        axes.axhline(2, color=GREY, linewidth=1, linestyle="--")
        axes.set(title=title, xlabel="epoch", xticks=epochs)
    whole.set_ylabel("tail index (2: Gaussian)")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def plot_topology(layers: Sequence[Row], channels: Sequence[Row], path: File) -> None:
    """Spearman between pairs of runs, of one data set and of two: of the layers, and of channels inside layers."""
    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, rows, key, title in (
        (panels[0], layers, "spearman", "layers"),
        (panels[1], channels, "spearman_inside", "channels inside a layer"),
    ):
        groups = {"same data,\nother seed": [row[key] for row in rows if row["data"] == row["other_data"]],
                  "other data": [row[key] for row in rows if row["data"] != row["other_data"]]}  # fmt: skip
        for place, values in enumerate(groups.values()):
            spread = [place + 0.24 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
            axes.plot(spread, values, "o", color=COLOURS[place], markersize=4, alpha=0.8)
        axes.axhline(0.8, color=GREY, linewidth=1, linestyle="--")
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set(title=title, xlim=(-0.5, 1.5), ylim=(0, 1.02))
    panels[0].set_ylabel("rank correlation of two runs")
    _save(figure, path)


def plot_coverage(rows: Sequence[Row], path: File) -> None:
    """Share of the pool trained at least once, by epoch."""
    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.subplots()
    styles = ("-", "--", ":")
    for name, colour in zip(_distinct(rows, "strategy"), COLOURS, strict=False):
        for budget, style in zip(_distinct(rows, "budget"), styles, strict=False):
            line = [row for row in rows if (row["strategy"], row["budget"]) == (name, budget)]
            axes.plot([row["epoch"] for row in line], [row["covered"] for row in line], style, color=colour,
                      label=f"{name}, {budget:,}")  # fmt: skip
    axes.set(xlabel="epoch", ylabel="channels of the pool trained once", ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside right center", frameon=False)
    _save(figure, path)


def plot_strategies(results: Sequence[dict[str, str]], path: File) -> None:
    """Test accuracy of every run, a row of dots for each strategy; the bar is the mean."""
    budgets = [budget for budget in _distinct(results, "budget") if budget] or [""]
    names = _distinct(results, "strategy")
    figure = Figure(figsize=(1.5 + 4.2 * len(budgets), 1.0 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for axes, budget in zip(panels, budgets, strict=True):
        for place, name in enumerate(names):
            values = [float(r["accuracy"]) for r in results
                      if r["strategy"] == name and r["budget"] in (budget, "") and r["accuracy"]]  # fmt: skip
            axes.plot(values, [place] * len(values), "o", color=COLOURS[1], markersize=4, alpha=0.7)
            if values:
                axes.plot([sum(values) / len(values)], [place], "|", color=COLOURS[0], markersize=14, markeredgewidth=2)
        axes.set(title=f"budget {int(budget):,}" if budget.isdigit() else budget, xlabel="test accuracy")
        axes.set_yticks(range(len(names)), names)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    _save(figure, path)


def plot_matrix(rows: Sequence[Row], path: File) -> None:
    """One-sided p that the row's strategy beats the column's: dark where it clearly does."""
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    found = {(row["strategy"], row["other"]): row for row in rows}
    table = [[found[one, other]["p_better"] if (one, other) in found else float("nan") for other in names]
             for one in names]  # fmt: skip
    size = 2.2 + 0.52 * len(names)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap="Blues_r", vmin=0, vmax=1)
    for i, line in enumerate(table):
        for j, p in enumerate(line):
            if p == p:
                axes.text(j, i, f"{p:.2f}", ha="center", va="center", fontsize=7, color="white" if p < 0.4 else "black")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set(title="p that the row beats the column (paired, one-sided)")
    figure.colorbar(image, ax=axes, shrink=0.7)
    _save(figure, path)


def short(name: str) -> str:
    """A data set's name up to its first underscore."""
    return name.partition("_")[0]


def _distinct(rows: Sequence[Any], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _save(figure: Figure, path: File) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.savefig(path, format="png", dpi=150)
