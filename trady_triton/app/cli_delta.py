"""`trady export` and `trady apply`: from a run to a small file, and from base weights and that file to full weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_model
from torch import nn

from trady_triton import Plan, apply_delta, apply_plan, save_delta
from trady_triton.app.build import count_classes, load_weights, parse_options, read_tensors
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
    reported,
)
from trady_triton.app.finetune import MODEL, PLAN
from trady_triton.delta import WHOLE
from trady_triton.serial import written_whole


@app.command()
@reported
def export(
    net: Net,
    run: Annotated[Path, typer.Option(help="Folder of a finished `trady finetune`.")],
    out: Annotated[Path, typer.Option(help="Write the delta here, as .safetensors.")],
    weights: Weights = None,
    pretrained: Pretrained = False,
    model_args: ModelArgs = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
) -> None:
    """Write what a run changed as a small file; name the weights and options that the run started from."""
    tuned = str(run / MODEL)
    classes = count_classes(net, read_tensors(tuned), parse_options(model_args), image_size)
    base = prepare(net, weights, pretrained, model_args, image_size, seed, classes)
    model = copy.deepcopy(base)
    load_weights(model, tuned)
    if (run / PLAN).exists():
        plan = Plan.load(run / PLAN)
        check_base(base, apply_plan(model, plan), plan, run)
    print(f"{out}: {save_delta(out, base, model)}")


@app.command()
@reported
def apply(
    net: Net,
    delta: Annotated[Path, typer.Argument(help="A file of `trady export`.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Write the weights here, as .safetensors.")],
    weights: Weights = None,
    pretrained: Pretrained = False,
    model_args: ModelArgs = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
) -> None:
    """Make the full weights from a delta and the weights that its run started from."""
    whole = {key.removeprefix(WHOLE): tensor for key, tensor in read_tensors(str(delta)).items()}
    classes = count_classes(net, whole, parse_options(model_args), image_size)
    model = prepare(net, weights, pretrained, model_args, image_size, seed, classes)
    apply_delta(model, delta)
    with written_whole(out) as scratch:
        save_model(model, str(scratch))
    note(f"weights written to {out}")


def check_base(base: nn.Module, model: nn.Module, plan: Plan, run: Path) -> None:
    """Raises ValueError where parameters differ that the plan does not train: the run started from another base."""
    drawn = {f"{name}.weight" for name in plan.pool}
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or name in drawn or torch.equal(parameter, base.get_parameter(name))):
            raise ValueError(
                f"{run}: {name!r} differs from this base, and the run's plan does not train it: give the --weights, "
                "--pretrained, --model-args or --seed that the run started from"
            )
