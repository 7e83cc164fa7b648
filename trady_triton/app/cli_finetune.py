"""`trady finetune`: train under a plan, save, and go on after a stop."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import nn

from trady_triton import Plan, Ranking
from trady_triton.app.checkpoint import previous
from trady_triton.app.cli_base import check_folder, command, note
from trady_triton.app.cli_options import Device, Network, Planning
from trady_triton.app.data import load_data
from trady_triton.app.finetune import CHECKPOINT, MODEL, PLAN, Interval, Run, Settings
from trady_triton.app.loader import Batches
from trady_triton.app.planning import load_plan, pick_device, rank_on
from trady_triton.app.tables import RunBar, plan_summary


@dataclass(frozen=True)
class Training:
    """How a run trains."""

    epochs: Annotated[int, typer.Option(min=1)] = 10
    lr: Annotated[float, typer.Option(help="Peak learning rate: linear warm-up, then a cosine to 0.")] = 0.125
    batch_size: Annotated[int, typer.Option(min=1, help="At most all images.")] = 32
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 0.0
    max_grad_norm: Annotated[float, typer.Option(min=0.0, help="Clip the norm of all gradients to this; 0: never.")] = (
        2.0
    )
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")] = 0.1
    augment: Annotated[bool, typer.Option(help="Random crops, mirror images and colours while training.")] = False

    def settings(self, batches: Batches) -> dict[str, Any]:
        """Those of `Settings`."""
        sizes = {"batch_size": batches.batch_size, "image_size": batches.image_size}
        return asdict(self) | sizes | {"max_grad_norm": self.max_grad_norm or None}


@command
def finetune(
    *,
    data: Annotated[str, typer.Option(help="A folder of classes, an .npz of JPEGs, or digits.")],
    method: Annotated[str, typer.Option(help="trady, full (all parameters) or head (the classifier alone).")] = "trady",
    network: Network,
    training: Training,
    planning: Planning,
    plan: Annotated[str | None, typer.Option(help="A plan of `trady plan --out`, instead of --budget.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 0,
    out: Annotated[
        Path | None, typer.Option(callback=check_folder, help="Folder of the run; runs/NET-METHOD by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")] = False,
    checkpoint_every: Annotated[
        str, typer.Option(help="Save inside an epoch too: steps (200), a time (10min), or never.")
    ] = "10min",
    device: Device = None,
) -> None:
    """Fine-tune a network on labelled images inside a memory budget, or whole, or the head alone."""
    folder, save_every = out or Path("runs") / f"{network.net}-{method}", Interval.parse(checkpoint_every)
    check_run(folder, resume, overwrite)
    check_method(method, plan, planning)
    where = pick_device(device)
    pictures = load_data(data)
    model = network.build(len(pictures.class_names), with_weights=not resume).to(where)
    size = min(training.batch_size, len(pictures.train.labels))  # a larger one would waste the budget, which counts it
    options = {"batch_size": size, "seed": network.seed, "augment": training.augment, "workers": workers}
    batches = Batches.for_model(pictures, model, image_size=network.image_size, **options)
    settings = Settings(network.net, data, method, optimizer=planning.optimizer, seed=network.seed,
                        planning=asdict(planning), **training.settings(batches))  # fmt: skip
    chosen = None
    if method == "trady" and (file := plan or (str(folder / PLAN) if resume else None)):
        chosen = load_plan(file, model, batches.image_size, batches.batch_size)
    elif method == "trady":
        chosen = new_plan(planning, model, batches)
    if chosen is not None:
        print(plan_summary(chosen))
    execute(Run(model, batches, settings, folder, chosen, save_every), resume)


def new_plan(planning: Planning, model: nn.Module, batches: Batches) -> Plan:
    """A plan on a ranking that is known, or else measured on the first training images."""
    ranking = planning.known_ranking(model, batches.image_size) or measured_ranking(model, batches)
    return planning.make(ranking, model, batches.image_size, batches.batch_size, batches.seed)


def measured_ranking(model: nn.Module, batches: Batches, steps: int = 4) -> Ranking:
    """A ranking on the first training images, and a word about it on stderr."""
    images = min(steps * batches.batch_size, len(batches.data.train.labels))
    note(f"ranking the layers on {images} training images; --ranking takes one that was measured longer")
    return rank_on(model, batches.ranking(steps), batches.seed)


def check_method(method: str, plan: str | None, planning: Planning) -> None:
    """Raises ValueError where the options of a plan contradict each other or the method."""
    if plan is not None and method != "trady":
        raise ValueError(f"--plan {plan}: --method {method} follows none")
    if plan is not None and planning.changed():
        raise ValueError(f"--plan {plan} and {planning.changed()[0]}: the plan says that already; wanted one of them")
    if method == "trady" and plan is None:
        planning.check_budget("--plan", False)


def check_run(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raises ValueError where a run would be lost, or there is none to go on with."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite: only one of them")
    exists = any(path.exists() for path in (folder / CHECKPOINT, previous(folder / CHECKPOINT)))
    if resume and not exists:
        raise ValueError(f"{folder}: no {CHECKPOINT} to resume from")
    if exists and not resume and not overwrite:
        raise ValueError(
            f"{folder} holds a run: --resume goes on with it, --overwrite starts anew, --out goes elsewhere"
        )


def execute(run: Run, resume: bool) -> None:
    """Train with a progress bar; after Ctrl-C say how to go on."""
    if resume:
        run.resume(note)
        note(f"resumed after {run.epoch} epochs and {run.step} steps")
    steps = run.batches.train_steps
    bar = RunBar(Console(), epochs=run.settings.epochs, train_steps=steps, done=run.epoch * steps + run.step)
    try:
        with bar:
            run.train(bar.step, bar.epoch)
    except KeyboardInterrupt:
        note(how_to_go_on(run))
        raise typer.Exit(130) from None
    told = f"test accuracy {run.records[-1]['test_accuracy']:.2%}; " if run.records else ""
    print(f"{told}weights in {run.out / MODEL}")


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
