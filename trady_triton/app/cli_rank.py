"""`trady rank`: the layers of a network in the order of what a unit of memory buys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trady_triton.app.build import check_name, input_size
from trady_triton.app.cli_base import (
    ImageSize,
    ModelArgs,
    Net,
    Pretrained,
    Seed,
    Weights,
    app,
    note,
    prepare,
    quick_ranking,
    reported,
)
from trady_triton.app.data import load_data
from trady_triton.app.loader import Batches
from trady_triton.app.planning import rank_on


@app.command()
@reported
def rank(
    net: Net,
    data: Annotated[str | None, typer.Option(help="A folder of classes, an .npz, or digits; noise by default.")] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    model_args: ModelArgs = None,
    image_size: ImageSize = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Batches to measure on.")] = 4,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write the ranking here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ranking into this PNG.")] = None,
) -> None:
    """Rank the layers of a network by their reweighted gradient norm (RGN)."""
    check_name(net)
    pictures = load_data(data) if data else None
    classes = len(pictures.class_names) if pictures else None
    model = prepare(net, weights, pretrained, model_args, image_size, seed, classes)
    if pictures is None:
        ranking = quick_ranking(model, input_size(model, image_size), batch_size, steps, seed)
    else:
        batches = Batches.for_model(pictures, model, image_size=image_size, batch_size=batch_size, seed=seed)
        ranking = rank_on(model, batches.ranking(steps), seed)
    print(ranking.table())
    if out is not None:
        ranking.save(out)
        note(f"ranking written to {out}")
    if plot is not None:
        from trady_triton.app.plots import plot_ranking

        plot_ranking(ranking, plot)
        note(f"plot written to {plot}")
