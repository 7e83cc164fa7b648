"""`trady plan`: what a memory budget buys, and what a step under it takes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from trady_triton import Plan, choose_recompute, make_plan
from trady_triton.app.build import input_size
from trady_triton.app.cli_base import (
    Budget,
    CostModelName,
    Coverage,
    DgradBudget,
    Fill,
    ImageSize,
    ModelArgs,
    Net,
    OptimizerName,
    PoolSize,
    Pretrained,
    RankingFile,
    Recompute,
    Sampler,
    Seed,
    Store,
    Weights,
    app,
    note,
    prepare,
    quick_ranking,
    reported,
    shipped_ranking,
)
from trady_triton.app.planning import describe, ledgers, load_ranking, parse_budget_option
from trady_triton.app.tables import ledger_table, plan_summary, plan_table
from trady_triton.strategies import strategy


@app.command()
@reported
def plan(
    net: Net,
    budget: Budget = None,
    memory: Annotated[str | None, typer.Option(help="Bytes of the whole step (2GiB), instead of --budget.")] = None,
    image_size: ImageSize = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples whose inputs are stored at once; for bytes.")] = 1,
    cost_model: CostModelName = "exact",
    ranking: RankingFile = None,
    k: PoolSize = None,
    coverage: Coverage = None,
    sampler: Sampler = "trady",
    dgrad_budget: DgradBudget = None,
    fill: Fill = "stop",
    store: Store = "same",
    optimizer: OptimizerName = "sgd",
    seed: Seed = 0,
    weights: Weights = None,
    pretrained: Pretrained = False,
    model_args: ModelArgs = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan here, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    recompute: Recompute = True,
    ledger: Annotated[bool, typer.Option("--ledger", help="Predict the memory and FLOPs of a step.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the bytes kept for the backward into this PNG.")] = None,
) -> None:
    """Show what a memory budget buys: costs, pool, expected draws and savings."""
    model = prepare(net, weights, pretrained, model_args, image_size, seed)
    size = input_size(model, image_size)
    measured = load_ranking(ranking, model, size) if ranking else shipped_ranking(model, size)
    measured = measured or quick_ranking(model, size, 8, 4, seed)
    if (budget is not None) + (memory is not None) != strategy(sampler).has_budget:
        wanted = "one" if strategy(sampler).has_budget else "none"
        raise ValueError(f"--budget and --memory: wanted {wanted} of them for --sampler {sampler}")
    if memory is None:
        amount = None if budget is None else parse_budget_option(budget)
        target: dict[str, Any] = {"budget": amount, "batch_size": batch_size}
    else:
        target = {"memory": memory, "model": model, "input_shape": (batch_size, 3, size, size)}
    options: dict[str, Any] = {
        "cost_model": cost_model,
        "k": k,
        "coverage": coverage,
        "sampler": sampler,
        "dgrad_budget": dgrad_budget,
        "fill": fill,
        "store": store,
        "seed": seed,
        "optimizer": optimizer,
    }
    made = make_plan(measured, **target, **options)
    if recompute and memory is None:
        made = choose_recompute(made, model, (batch_size, 3, size, size))
    books = ledgers(model, made, size, batch_size) if ledger or plot else {}
    if as_json:
        print(json.dumps(describe(made, net) | ({"ledger": asdict(books["trady"])} if ledger else {})))
    else:
        show_plan(made)
        if ledger:
            Console(width=None if sys.stdout.isatty() else 120).print(ledger_table(books))
    if plot is not None:
        from trady_triton.app.plots import plot_memory

        plot_memory({method: entry.kept_by_kind for method, entry in books.items()}, plot, title=net)
        note(f"plot written to {plot}")
    if out is not None:
        made.save(out)
        note(f"plan written to {out}")


def show_plan(made: Plan) -> None:
    """Table and summary on stdout."""
    Console(width=None if sys.stdout.isatty() else 120).print(plan_table(made))
    print(plan_summary(made))
