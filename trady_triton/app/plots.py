"""Plots as PNG files: accuracy over epochs, bytes kept by kind, the ranking of the layers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trady_triton import Ranking, make_plan
from trady_triton.cost import CostModel
from trady_triton.meters import KINDS

# Okabe and Ito's colours, which colour-blind readers tell apart
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#B0B0B0"
MIB = 1 << 20

File = str | os.PathLike[str]


def plot_accuracy(curves: Mapping[str, Sequence[float]], path: File, *, title: str = "") -> None:
    """Test accuracy (shares) after each epoch, one line a method."""
    figure, axes = _figure(7.0, 4.2)
    for (method, values), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        axes.plot(range(1, len(values) + 1), values, color=colour, marker=marker, markersize=5, label=method)
    axes.set(title=title, xlabel="epoch", ylabel="test accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def plot_memory(kept: Mapping[str, Mapping[str, int]], path: File, *, title: str = "") -> None:
    """Bytes kept for the backward by kind, one stacked bar a method; every bar says its total.

    Kinds too small to be seen have no place in the legend, but in the total; trained channels are named beside it.
    """
    totals = {method: sum(by_kind.values()) for method, by_kind in kept.items()}
    visible = [
        kind for kind in KINDS if max(by_kind.get(kind, 0) for by_kind in kept.values()) > 1e-3 * max(totals.values())
    ]
    figure, axes = _figure(8.0, 1.8 + 0.6 * len(kept))
    start = dict.fromkeys(kept, 0.0)
    for kind in visible:
        widths = {method: by_kind.get(kind, 0) / MIB for method, by_kind in kept.items()}
        colour = COLOURS[KINDS.index(kind)]
        axes.barh(list(kept), list(widths.values()), 0.62, left=list(start.values()), color=colour, label=kind)
        start = {method: start[method] + width for method, width in widths.items()}
    for method, total in totals.items():
        text = f"{total / MIB:.{1 if total >= 10 * MIB else 2}f} MiB"
        if channels := kept[method].get(KINDS[0]):
            text += f", {channels / MIB:.2f} of it {KINDS[0]}"
        axes.annotate(text, (total / MIB, method), (5, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(totals.values()) / MIB)
    axes.set(title=title, xlabel="bytes kept for the backward (MiB)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(KINDS), frameon=False)
    _save(figure, path)


def plot_ranking(ranking: Ranking, path: File, *, coverage: float = 0.976) -> None:
    """RGN (elements, one sample) of each layer, best first, and its cumulative share.

    The first K layers stand out, which `make_plan` takes at this coverage.
    """
    rgn = {layer.name: layer.rgn(CostModel()) for layer in ranking.layers}
    names = ranking.order()
    chosen = _pool_size(ranking, coverage)
    figure, bars, curve = _two_panels(max(7.0, 1.6 + 0.17 * len(names)))
    places = range(1, len(names) + 1)
    bars.bar(places, [rgn[name] for name in names], color=[COLOURS[1] if i <= chosen else GREY for i in places])
    bars.set(
        ylabel="RGN (norm per element)",
        title=f"{len(names)} layers by reweighted gradient norm; a plan takes the first {chosen}",
    )
    shares = [total / sum(rgn.values()) for total in accumulate(rgn[name] for name in names)]
    curve.plot(places, shares, color=COLOURS[1], marker=".", markersize=5)
    curve.axvline(chosen, color=COLOURS[0], linewidth=1.2)
    side = (-6, "right") if chosen > len(names) / 2 else (6, "left")
    curve.annotate(f"K = {chosen}: {shares[chosen - 1]:.1%}", (chosen, 0.12), (side[0], 0), ha=side[1],
                   textcoords="offset points", color=COLOURS[0])  # fmt: skip
    curve.set(ylabel="cumulative share", xlim=(0.3, len(names) + 0.7), ylim=(0, 1.05))
    curve.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    curve.set_xticks(list(places), names, rotation=90, fontsize=7)
    for axes in (bars, curve):
        axes.grid(axis="y", alpha=0.3)
    _save(figure, path)


def _pool_size(ranking: Ranking, coverage: float) -> int:
    """How many layers a plan of this coverage takes; the budget has no part in it."""
    whole = sum(layer.shape.weights + layer.shape.inputs for layer in ranking.layers)
    return len(make_plan(ranking, budget=whole, coverage=coverage).pool)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _two_panels(width: float) -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(width, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    return figure, upper, lower


def _save(figure: Figure, path: File) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.savefig(path, format="png", dpi=150)
