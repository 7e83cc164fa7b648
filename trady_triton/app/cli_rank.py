"""`trady rank`: the layers of a network in the order of what a unit of memory buys."""

from __future__ import annotations

from typing import Annotated

import typer

from trady_triton.app.cli_base import command, note
from trady_triton.app.cli_options import Network, OutFile, PlotFile
from trady_triton.app.data import load_data
from trady_triton.app.loader import Batches
from trady_triton.app.planning import rank_on, rank_on_noise


@command
def rank(
    network: Network,
    data: Annotated[str | None, typer.Option(help="A folder of classes, an .npz, or digits; noise by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Batches to measure on.")] = 4,
    out: OutFile = None,
    plot: PlotFile = None,
) -> None:
    """Rank the layers of a network by their reweighted gradient norm (RGN)."""
    seed = network.seed
    if data is None:
        model = network.build()
        size = network.size(model)
        ranking = rank_on_noise(model, size, batch_size=batch_size, steps=steps, seed=seed, say=note)
    else:
        pictures = load_data(data)
        model = network.build(len(pictures.class_names))
        batches = Batches.for_model(pictures, model, image_size=network.image_size, batch_size=batch_size, seed=seed)
        ranking = rank_on(model, batches.ranking(steps), seed)
    print(ranking.table())
    if out is not None:
        ranking.save(out)
        note(f"ranking written to {out}")
    if plot is not None:
        from trady_triton.app.plots import plot_ranking

        plot_ranking(ranking, plot)
        note(f"plot written to {plot}")
