"""How far the gradients of a quantised store lie from those of an exact one: the table of docs/store.md.

    python -m trady_triton.bench.store_error --image-size 112 resnet50 mobilenetv2_100

Every layer is drawn whole, so that the error is that of the store alone. Relative error of a layer: |dW' - dW| / |dW|.
"""

from __future__ import annotations

from statistics import fmean, median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trady_triton import Plan, TraDyOptimizer, apply_plan, make_plan, remove_plan
from trady_triton.bench.nets import Net
from trady_triton.slot import find_slot


def gradients(model: nn.Module, plan: Plan, batch: tuple[Tensor, Tensor], steps: int) -> list[dict[str, Tensor]]:
    """The compact gradients of every layer with the rounding of steps 0 to `steps` - 1, weights unchanged."""
    apply_plan(model, plan)
    optimizer = TraDyOptimizer(model.parameters(), plan)
    optimizer.resample(0)
    slots = [slot for parameter in model.parameters() if (slot := find_slot(parameter)) is not None]
    found = []
    for step in range(steps):
        for slot in slots:
            slot.seed_step(step)
        cross_entropy(model(batch[0]), batch[1]).backward()
        found.append({slot.layer: slot.proxy.grad.double() for slot in slots if slot.proxy.grad is not None})
        optimizer.zero_grad()
    remove_plan(model)
    return found


def compare(net: Net, store: str, steps: int) -> dict[str, float]:
    """Relative errors over the layers, that of the mean over the steps, and the store's bytes against the exact one."""
    model = net.build()
    ranking, batch = net.rank(model), (net.inputs(), net.target())
    exact, quantised = (
        make_plan(ranking, budget="1024GiB", coverage=1.0, batch_size=net.batch, store=kind) for kind in ("same", store)
    )
    (reference,) = gradients(model, exact, batch, 1)
    found = gradients(model, quantised, batch, steps)
    layers = [name for name, grad in reference.items() if grad.norm() > 0]
    errors = {name: fmean(distance(grads[name], reference[name]) for grads in found) for name in layers}
    means = [distance(torch.stack([grads[name] for grads in found]).mean(0), reference[name]) for name in layers]
    stored = [
        sum(plan.shapes[name].in_channels * plan.cost.activation_cost(plan.shapes[name]) for name in plan.pool)
        for plan in (exact, quantised)
    ]
    return {
        "median": median(errors.values()),
        "largest": max(errors.values()),
        "median of the mean": median(means),
        "bytes": stored[1] / stored[0],
    }


def distance(grad: Tensor, reference: Tensor) -> float:
    """|grad - reference| / |reference|."""
    return float((grad - reference).norm() / reference.norm())


def main(
    nets: Annotated[list[str], typer.Argument(help="timm model names.")],
    image_size: Annotated[int, typer.Option()] = 112,
    batch_size: Annotated[int, typer.Option()] = 8,
    steps: Annotated[int, typer.Option(help="Roundings to average over.")] = 8,
) -> None:
    """Print the table."""
    table = Table("net", "store", "median", "largest", f"of the mean of {steps}", "bytes of the store")
    for name in nets:
        for store in ("int8", "int4"):
            row = compare(Net(name, batch_size, image_size), store, steps)
            *errors, size = row.values()
            table.add_row(name, store, *(f"{error:.2%}" for error in errors), f"{size:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
