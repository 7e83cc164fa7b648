"""TraDy's step beside plain PyTorch's with the same layers frozen: lean layers, and recomputed blocks, at their price.

The rival trains the layers that TraDy's epoch has drawn, whole, as plain PyTorch knows no part of a weight; everything
else is frozen, BatchNorm in eval mode. It is paired with lean layers where nothing is recomputed, and under timm's
checkpointing with the blocks that `choose_recompute` picks.
"""

from __future__ import annotations

import copy
import gc
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from trady_triton.bench.case import agree, count, failure, ratios_of, seconds
from trady_triton.bench.config import RESULTS, Mode, bars_nets_of, device_of, results_folder, settings
from trady_triton.bench.gate import Gate
from trady_triton.bench.methods import METHODS, Method
from trady_triton.bench.nets import Net
from trady_triton.bench.rivals import checkpointing, partial
from trady_triton.bench.store import Store
from trady_triton.bench.tables import Row, markdown, mib, wide_console
from trady_triton.bench.training import Setup, Training, step_of
from trady_triton.rehearsal import Step

WAYS = {
    "lean": METHODS["trady-lean"],
    "frozen": Method("drawn layers, dense", partial.drawn_dense, budget=1),
    "recomputed": METHODS["trady"],
    "checkpointed": Method("drawn layers, dense, timm checkpointing", checkpointing.drawn_dense, budget=1),
}
PAIRS = {"lean": "frozen", "recomputed": "checkpointed"}
DRAWS, ROUNDS = 2, 3  # each draw takes a step that is not timed first: in training it serves an epoch


def run(mode: str, out: Path = RESULTS, console: Console | None = None, nets: list[Net] | None = None) -> Store:
    """Measure the nets that the store does not hold yet."""
    torch.backends.cudnn.benchmark = True  # as in the worker of the other benchmarks
    console, budget = console or Console(), settings(mode)["bars"]["budget"]
    store = Store(results_folder(mode, out) / "bars.json", device_of(mode))
    nets = nets or bars_nets_of(mode)
    store.keep({net.name for net in nets})
    for net in track(nets, "bars", console=console, disable=not console.is_terminal):
        inputs = {**net.described(), "budget": budget, "draws": DRAWS, "rounds": ROUNDS}
        if not store.is_done(net.name, inputs):
            try:
                row = measure(net, budget)
            except Exception as error:  # such as too little memory: the others go on
                row = failure(error)
            store.put(net.name, inputs, net.described() | row)
            gc.collect()
    return store


def measure(net: Net, budget: str) -> Row:
    """Kept bytes, peaks and milliseconds of all ways, each pair's ratio of times; a red gate shows no time."""
    gate = Gate(net, (budget,) * 3)
    for method in WAYS.values():
        verdict = gate.check(method)
        if not verdict.is_green:
            return {"status": "red", "why": f"{method.label}: {verdict.why}"}
    del gate
    model, step = net.build(), step_of(net)
    setup = Setup(net, net.rank(model), (budget,) * 3)
    trainings = {way: method.set_up(copy.deepcopy(model), setup) for way, method in WAYS.items()}
    counts = {way: count(training, step) for way, training in trainings.items()}
    times = timed(trainings, step)
    figures: dict[str, Any] = {
        way: {"kept_bytes": counts[way]["kept_bytes"], "peak_bytes": counts[way]["peak_bytes"], "ms": times[way]}
        for way in WAYS
    }
    medians = {way: statistics.median(_ratios(figures, way)) for way in PAIRS}
    return {"status": "ok", "ratios": medians, **figures}


def _ratios(row: Row, way: str) -> list[float]:
    return ratios_of(row[way]["ms"], row[PAIRS[way]]["ms"])


def timed(trainings: dict[str, Training], step: Step) -> dict[str, list[float]]:
    """Milliseconds of steps, all ways in turn: at most ROUNDS in each of DRAWS epochs."""
    times: dict[str, list[float]] = {way: [] for way in trainings}
    for epoch in range(DRAWS):
        for training in trainings.values():
            training.begin(epoch)
            training.step(step)
        for turn in range(1, ROUNDS + 1):
            for way, training in trainings.items():
                times[way].append(1e3 * seconds(training, step))
            if all(agree(ratios_of(times[way][-turn:], times[rival][-turn:])) for way, rival in PAIRS.items()):
                break
    return times


def bars_table(content: Row) -> str:
    """Markdown, a row a net: the ratios of the times, and what is kept for the backward."""
    columns = ("net, batch, px", "time: lean / frozen (bar 1.15)", "time: recomputed / checkpointed (bar 1)",
               "kept, MiB: lean", "frozen", "recomputed", "checkpointed")  # fmt: skip
    lines = []
    for row in content["cases"].values():
        name = f"{row['net']}, {row['batch']}, {row['image_size']}"
        if row["status"] != "ok":
            lines.append((name, f"{row['status']}: {row['why']}", *["-"] * 5))
            continue
        ranges = [(min(_ratios(row, way)), max(_ratios(row, way))) for way in PAIRS]
        times = [f"{row['ratios'][way]:.2f} ({a:.2f} to {b:.2f})" for way, (a, b) in zip(PAIRS, ranges, strict=True)]
        lines.append((name, *times, *(mib(row[way]["kept_bytes"]) for way in WAYS)))
    return markdown(columns, lines)


def main(
    mode: Mode = "cpu",
    batch: Annotated[int | None, typer.Option(help="Samples of a step, instead of the mode's.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width, instead of the mode's.")] = None,
    net: Annotated[list[str] | None, typer.Option(help="Only these nets.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure TraDy's step beside plain PyTorch's with the same layers frozen."""
    console = wide_console()
    nets = [
        replace(one, batch=batch or one.batch, image_size=image_size or one.image_size)
        for one in bars_nets_of(mode)
        if net is None or one.name in net
    ]
    store = run(mode, out, console, nets)
    console.print(bars_table({"cases": store.rows}), highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    typer.run(main)
