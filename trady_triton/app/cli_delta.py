"""`trady export` and `trady apply`: from a run to a small file, and from base weights and that file to full weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_model
from torch import Tensor, nn

from trady_triton import Plan, apply_delta, apply_plan, save_delta
from trady_triton.app.build import count_classes, load_weights, parse_options, read_tensors
from trady_triton.app.cli_base import check_file, command, note
from trady_triton.app.cli_options import Network
from trady_triton.app.finetune import MODEL, PLAN
from trady_triton.delta import WHOLE
from trady_triton.serial import written_whole

TensorFile = Annotated[Path, typer.Option(callback=check_file, help="Write it here, as .safetensors.")]


@command
def export(
    network: Network,
    run: Annotated[Path, typer.Option(help="Folder of a finished `trady finetune`.")],
    out: TensorFile,
) -> None:
    """Write what a run changed as a small file; name the weights and options that it started from."""
    tuned = str(run / MODEL)
    base = built_for(network, read_tensors(tuned))
    model = copy.deepcopy(base)
    load_weights(model, tuned)
    if (run / PLAN).exists():
        plan = Plan.load(run / PLAN)
        check_base(base, apply_plan(model, plan), plan, run)
    print(f"{out}: {save_delta(out, base, model)}")


@command
def apply(
    network: Network,
    delta: Annotated[Path, typer.Argument(help="A file of `trady export`.", show_default=False)],
    out: TensorFile,
) -> None:
    """Make the full weights from a delta and the weights that its run started from."""
    whole = {key.removeprefix(WHOLE): tensor for key, tensor in read_tensors(str(delta)).items()}
    model = built_for(network, whole)
    apply_delta(model, delta)
    with written_whole(out) as scratch:
        save_model(model, str(scratch))
    note(f"weights written to {out}")


def built_for(network: Network, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network, with as many classes as the classifier among the tensors has."""
    classes = count_classes(network.net, tensors, parse_options(network.model_args), network.image_size)
    return network.build(classes)


def check_base(base: nn.Module, model: nn.Module, plan: Plan, run: Path) -> None:
    """Raises ValueError where parameters differ that the plan does not train: the run started from another base."""
    drawn = {f"{name}.weight" for name in plan.pool}
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or name in drawn or torch.equal(parameter, base.get_parameter(name))):
            raise ValueError(
                f"{run}: {name!r} differs from this base, and the run's plan does not train it: give the --weights, "
                "--pretrained, --model-args or --seed that the run started from"
            )
