"""The `trady` command: rank, plan, finetune, demo. Options and messages; the work is in the modules beside it."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import torch
import typer
from rich.console import Console
from torch import nn

from trady_triton import Plan, Ranking, choose_recompute, make_plan
from trady_triton.app.build import build_model, check_name, input_size, load_weights, parse_options
from trady_triton.app.data import load_data
from trady_triton.app.finetune import CHECKPOINT, MODEL, PLAN, Run, Settings
from trady_triton.app.loader import Batches
from trady_triton.app.planning import (
    describe,
    ledgers,
    load_plan,
    load_ranking,
    parse_budget_option,
    pick_device,
    rank_on,
    rank_on_noise,
)
from trady_triton.app.tables import RunBar, ledger_table, plan_summary, plan_table

app = typer.Typer(
    help="Fine-tune pretrained networks inside a strict memory budget (TraDy).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

P = ParamSpec("P")
R = TypeVar("R")

Net = Annotated[str, typer.Argument(help="A timm model name, such as mobilenetv2_100.", show_default=False)]
Weights = Annotated[str | None, typer.Option(help="Weights to start from: a .safetensors file or a torch file.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Start from timm's weights, which it downloads.")]
ModelArgs = Annotated[str | None, typer.Option(help='More for timm.create_model, as JSON: {"pad_type": "same"}.')]
ImageSize = Annotated[int | None, typer.Option(min=8, help="Input height and width; the model's own by default.")]
RankingFile = Annotated[str | None, typer.Option("--ranking", help="A ranking of `trady rank --out`.")]
Budget = Annotated[str | None, typer.Option(help="Elements for one sample (27946), or bytes for a batch (256KiB).")]
CostModelName = Annotated[str, typer.Option("--cost-model", help="exact, or paper: depthwise channels cost 1 weight.")]
PoolSize = Annotated[int | None, typer.Option("--k", help="Layers in the pool, instead of --coverage.")]
Coverage = Annotated[float, typer.Option(help="Share of the summed RGN that the pool must hold.")]
Fill = Annotated[str, typer.Option(help="A channel that does not fit ends the draw (stop) or is left out (skip).")]
Recompute = Annotated[bool, typer.Option(help="Run blocks again in the backward where that keeps half or less: exact.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random.")]


def main() -> None:
    """Entry point of the `trady` command."""
    app()


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """Turn a user's mistake into one line on stderr and exit code 1; Ctrl-C gives 130."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            typer.echo("error: " + " ".join(str(error).split()), err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error

    return wrapper


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
    coverage: Coverage = 0.976,
    fill: Fill = "stop",
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
    measured = load_ranking(ranking, model, size) if ranking else quick_ranking(model, size, 8, 4, seed)
    if (budget is None) == (memory is None):
        raise ValueError("--budget and --memory: wanted one of them")
    if budget is not None:
        target: dict[str, Any] = {"budget": parse_budget_option(budget), "batch_size": batch_size}
    else:
        target = {"memory": memory, "model": model, "input_shape": (batch_size, 3, size, size)}
    options: dict[str, Any] = {"cost_model": cost_model, "k": k, "coverage": coverage, "fill": fill, "seed": seed}
    made = make_plan(measured, **target, **options)
    if recompute and budget is not None:
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


@app.command()
@reported
def finetune(
    net: Net,
    data: Annotated[str, typer.Option(help="A folder of classes, an .npz of JPEGs, or digits.")],
    budget: Budget = None,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    lr: Annotated[float, typer.Option(help="Peak learning rate: linear warm-up, then a cosine to 0.")] = 0.125,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    method: Annotated[str, typer.Option(help="trady, full (all parameters) or head (the classifier alone).")] = "trady",
    weights: Weights = None,
    pretrained: Pretrained = False,
    model_args: ModelArgs = None,
    ranking: RankingFile = None,
    plan: Annotated[str | None, typer.Option(help="A plan of `trady plan --out`, instead of --budget.")] = None,
    cost_model: CostModelName = "exact",
    k: PoolSize = None,
    coverage: Coverage = 0.976,
    fill: Fill = "stop",
    recompute: Recompute = True,
    image_size: ImageSize = None,
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option(min=0.0, help="Clip the norm of all gradients to this; 0: never.")
    ] = 2.0,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")] = 0.1,
    augment: Annotated[bool, typer.Option(help="Random crops, mirror images and colours while training.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 0,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NET-METHOD by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; a GPU by default where there is one.")] = None,
) -> None:
    """Fine-tune a network on labelled images inside a memory budget, or whole, or the head alone."""
    folder = out or Path("runs") / f"{net}-{method}"
    check_folder(folder, resume, overwrite)
    check_name(net)
    where = pick_device(device)
    pictures = load_data(data)
    kept = (None, False) if resume else (weights, pretrained)
    model = prepare(net, *kept, model_args, image_size, seed, len(pictures.class_names)).to(where)
    batches = Batches.for_model(
        pictures, model, image_size=image_size, batch_size=batch_size, seed=seed, augment=augment, workers=workers
    )
    settings = Settings(
        net=net,
        data=data,
        method=method,
        budget=budget,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        image_size=batches.image_size,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm or None,
        warmup=warmup,
        augment=augment,
        seed=seed,
    )

    chosen = None
    if method == "trady" and (file := plan or (str(folder / PLAN) if resume else None)):
        chosen = load_plan(file, model, batches.image_size)
    elif method == "trady":
        if budget is None:
            raise ValueError("--method trady needs --budget or --plan")
        chosen = make_plan(
            load_ranking(ranking, model, batches.image_size) if ranking else measured_ranking(model, batches),
            budget=parse_budget_option(budget),
            batch_size=batch_size,
            cost_model=cost_model,
            k=k,
            coverage=coverage,
            fill=fill,
            seed=seed,
        )
        if recompute:
            chosen = choose_recompute(chosen, model, (batch_size, 3, batches.image_size, batches.image_size))
    if chosen is not None:
        print(plan_summary(chosen))
    execute(Run(model, batches, settings, folder, chosen), resume)


@app.command()
@reported
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plots and the numbers.")] = Path("demo-output"),
) -> None:
    """Fine-tune a pretrained EfficientNet-Lite0 on handwritten digits: everything, the head, TraDy at two budgets."""
    from trady_triton.app.demo import run

    run(out)


def prepare(
    net: str,
    weights: str | None,
    pretrained: bool,
    model_args: str | None,
    image_size: int | None,
    seed: int,
    num_classes: int | None = None,
) -> nn.Module:
    """The network that the options ask for, its random weights seeded."""
    if weights and pretrained:
        raise ValueError("--weights and --pretrained: only one of them")
    torch.manual_seed(seed)
    options = parse_options(model_args)
    model = build_model(net, num_classes=num_classes, image_size=image_size, pretrained=pretrained, options=options)
    if weights:
        fresh = load_weights(model, weights)
        note(f"{weights}: loaded" + (f"; not in the file, so random: {', '.join(fresh)}" if fresh else ""))
    return model


def quick_ranking(model: nn.Module, image_size: int, batch_size: int, steps: int, seed: int) -> Ranking:
    """A ranking on noise, and a word about it on stderr."""
    note(f"no data or ranking given: a quick ranking on {steps} x {batch_size} random images and labels, seed {seed}")
    return rank_on_noise(model, image_size, batch_size=batch_size, steps=steps, seed=seed)


def measured_ranking(model: nn.Module, batches: Batches, steps: int = 4) -> Ranking:
    """A ranking on the first training images, and a word about it on stderr."""
    images = min(steps * batches.batch_size, len(batches.data.train.labels))
    note(f"ranking the layers on {images} training images; --ranking takes one that was measured longer")
    return rank_on(model, batches.ranking(steps), batches.seed)


def show_plan(made: Plan) -> None:
    """Table and summary on stdout."""
    Console(width=None if sys.stdout.isatty() else 120).print(plan_table(made))
    print(plan_summary(made))


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raises ValueError where a run would be lost, or there is none to go on with."""
    exists = (folder / CHECKPOINT).exists()
    if resume and not exists:
        raise ValueError(f"{folder}: no {CHECKPOINT} to resume from")
    if exists and not resume and not overwrite:
        raise ValueError(
            f"{folder} holds a run: --resume goes on with it, --overwrite starts anew, --out goes elsewhere"
        )


def execute(run: Run, resume: bool) -> None:
    """Train with a progress bar; after Ctrl-C say how to go on."""
    if resume:
        run.resume()
        note(f"resumed after {run.epoch} epochs and {run.step} steps")
    steps = run.batches.train_steps
    bar = RunBar(Console(), epochs=run.settings.epochs, train_steps=steps, done=run.epoch * steps + run.step)
    try:
        with bar:
            run.train(bar.step, bar.epoch)
    except KeyboardInterrupt:
        note(how_to_go_on(run))
        raise typer.Exit(130) from None
    print(f"test accuracy {run.records[-1]['test_accuracy']:.2%}; weights in {run.out / MODEL}")


def how_to_go_on(run: Run) -> str:
    """What a stopped run left behind, and the command that continues it."""
    if run.saved is None:
        return "stopped before anything was saved"
    again = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
    epoch, step = run.saved
    done = f"{epoch} of {run.settings.epochs} epochs" + (f" and {step} steps" if step else "")
    return (
        f"stopped; {done} are saved in {run.out / CHECKPOINT}. To go on:\n  {shlex.join(['trady', *again, '--resume'])}"
    )


def note(text: str) -> None:
    """A remark on stderr, so that stdout holds results only."""
    typer.echo(text, err=True)
