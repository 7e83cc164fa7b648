"""The study's tables in a Markdown page, between markers `<!-- study:NAME -->` and `<!-- /study -->`, from its CSVs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from trady_triton.app.experiment import read_csv
from trady_triton.bench.markers import fill_blocks

Rows = Sequence[Mapping[str, str]]


def refresh(page: Path, folder: Path) -> None:
    """Fill the tables of a page from the CSV files of a study's folder; a table whose file is missing stays.

    Raises:
        ValueError: a marker that no table belongs to.
    """

    def table(name: str) -> str | None:
        file, make = TABLES[name]
        return make(read_csv(folder / file)) if (folder / file).exists() else None

    page.write_text(fill_blocks(page.read_text(), "study", TABLES, table))


def _strategies(rows: Rows) -> str:
    lines = [
        [r["strategy"], _count(r["budget"]) if r["budget"] else "-", f"{float(r['lr']):g}", r["runs"],
         _accuracy(r), f"{float(r['kept_bytes']) / 2**20:.2f}", f"{float(r['dgrad_flops']) / 1e9:.3f}",
         f"{float(r['wgrad_flops']) / 1e9:.4f}", f"{float(r['probed_batches']):.0f}"]
        for r in rows
    ]  # fmt: skip
    titles = ["strategy", "budget", "lr", "runs", "accuracy, % (std)", "kept, MiB", "dX, GFLOP", "dW, GFLOP",
              "extra batches"]  # fmt: skip
    return _table(titles, lines)


def _versus(rows: Rows) -> str:
    lines = [
        [f"{r['strategy']} - {r['other']}", f"{100 * float(r['difference']):+.2f}", f"{r['wins']} of {r['pairs']}",
         f"{float(r['t']):.2f}", _p(r["p"])]
        for r in rows
        if r["strategy"] == "trady"
    ]  # fmt: skip
    return _table(["pair", "difference, points", "wins", "t", "p, two-sided"], lines)


def _tails(rows: Rows) -> str:
    lines = []
    for data in dict.fromkeys(r["data"] for r in rows):
        own = [r for r in rows if r["data"] == data]
        low, high = min(float(r["alpha"]) for r in own), max(float(r["alpha"]) for r in own)
        middle = [float(r["layers_median"]) for r in own]
        ends = min(float(r["layers_min"]) for r in own), max(float(r["layers_max"]) for r in own)
        lines.append([data, str(len({r["seed"] for r in own})), f"{low:.2f} to {high:.2f}",
                      f"{min(middle):.2f} to {max(middle):.2f}", f"{ends[0]:.2f} to {ends[1]:.2f}"])  # fmt: skip
    return _table(["data", "seeds", "all gradients together", "median layer", "all layers"], lines)


def _nets(rows: Rows) -> str:
    lines = [
        [r["net"], r["data"], f"{float(r['alpha_min']):.2f} to {float(r['alpha_max']):.2f}",
         f"{float(r['layers_min']):.2f} to {float(r['layers_max']):.2f}", f"{r['k']} of {r['layers']}"]
        for r in rows
    ]  # fmt: skip
    titles = ["net", "data", "tail index, all gradients", "tail index, median layer", "layers with 97.6 % of RGN"]
    return _table(titles, lines)


def _layers(rows: Rows) -> str:
    return _grouped(rows, ("spearman", "spearman_rgn"), ["norms: mean (least)", "RGN: mean (least)"])


def _channels(rows: Rows) -> str:
    titles = ["inside layers: mean (least)", "over the net: mean (least)", "t-test p: mean (least)"]
    return _grouped(rows, ("spearman_inside", "spearman", "t_test_p"), titles)


def _savings(rows: Rows) -> str:
    lines = [
        [r["strategy"], _count(r["budget"]), r["layers"], f"{float(r['channels']):.0f}",
         *(f"{100 * float(r[key]):.1f}" for key in ("weights", "activations", "dw_flops", "dx_flops"))]
        for r in rows
    ]  # fmt: skip
    titles = ["strategy", "budget", "layers", "channels an epoch", "weight gradients saved, %",
              "stored inputs saved, %", "dW FLOPs saved, %", "dX FLOPs saved, %"]  # fmt: skip
    return _table(titles, lines)


TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "strategies": ("strategies.csv", _strategies),
    "versus": ("comparisons.csv", _versus),
    "tails": ("tails.csv", _tails),
    "nets": ("nets/nets.csv", _nets),
    "layers": ("layers.csv", _layers),
    "channels": ("channels.csv", _channels),
    "savings": ("savings.csv", _savings),
}


def _grouped(rows: Rows, keys: Sequence[str], titles: list[str]) -> str:
    """Pairs of runs of the same data set and of two: mean and smallest of each column."""
    groups = {"same data, other seed": [r for r in rows if r["data"] == r["other_data"]],
              "other data": [r for r in rows if r["data"] != r["other_data"]]}  # fmt: skip
    lines = []
    for name, own in groups.items():
        values = [[float(r[key]) for r in own] for key in keys]
        cells = [f"{mean(column):.2f} ({min(column):.2g})" if column else "-" for column in values]
        lines.append([name, str(len(own)), *cells])
    return _table(["runs", "pairs", *titles], lines)


def _accuracy(row: Mapping[str, str]) -> str:
    mean_, std = float(row["accuracy"]), float(row["std"])
    text = f"{100 * mean_:.2f}" + ("" if std != std else f" ({100 * std:.2f})")
    return text + (f", {row['diverged']} diverged" if row["diverged"] != "0" else "")


def _p(text: str) -> str:
    return "< 0.001" if float(text) < 0.001 else f"{float(text):.3f}"


def _count(text: str) -> str:
    return f"{int(text):,}" if text.isdigit() else text


def _table(titles: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
