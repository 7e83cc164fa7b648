"""`trady plan`: what a memory budget buys, and what a step under it takes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from trady_triton import Plan, make_plan
from trady_triton.app.cli_base import command, note
from trady_triton.app.cli_options import Network, OutFile, Planning, PlotFile
from trady_triton.app.planning import describe, ledgers, rank_on_noise
from trady_triton.app.tables import ledger_table, plan_summary, plan_table
from trady_triton.search import EXACT, parse_memory


@command
def plan(
    *,
    memory: Annotated[str | None, typer.Option(help="Bytes of the whole step (2GiB), instead of --budget.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples whose inputs are stored at once; for bytes.")] = 1,
    planning: Planning,
    network: Network,
    out: OutFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    ledger: Annotated[bool, typer.Option("--ledger", help="Predict the memory and FLOPs of a step.")] = False,
    plot: PlotFile = None,
) -> None:
    """Show what a memory budget buys: costs, pool, expected draws and savings."""
    planning.check_budget("--memory", memory is not None)
    if memory is not None:
        parse_memory(memory)
    model = network.build()
    size = network.size(model)
    ranking = planning.known_ranking(model, size) or rank_on_noise(model, size, seed=network.seed, say=note)
    if memory is None:
        made = planning.make(ranking, model, size, batch_size, network.seed)
    else:
        options = planning.options(network.seed) | {"allow": EXACT if planning.recompute else ("micro_batch",)}
        made = make_plan(ranking, memory=memory, model=model, input_shape=(batch_size, 3, size, size), **options)
    books = ledgers(model, made, size, batch_size) if ledger or plot else {}
    if as_json:
        print(json.dumps(describe(made, network.net) | ({"ledger": asdict(books["trady"])} if ledger else {})))
    else:
        show_plan(made)
        if ledger:
            Console(width=None if sys.stdout.isatty() else 120).print(ledger_table(books))
    if plot is not None:
        from trady_triton.app.plots import plot_memory

        plot_memory({method: entry.kept_by_kind for method, entry in books.items()}, plot, title=network.net)
        note(f"plot written to {plot}")
    if out is not None:
        made.save(out)
        note(f"plan written to {out}")


def show_plan(made: Plan) -> None:
    """Table and summary on stdout."""
    Console(width=None if sys.stdout.isatty() else 120).print(plan_table(made))
    print(plan_summary(made))
