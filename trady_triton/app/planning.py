"""Rankings and plans for the command: measured here, or read from a file and checked against the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from trady_triton import Ledger, Plan, Ranking, ledger, rank_layers
from trady_triton.app.loader import random_batches
from trady_triton.cost import CostModel, LayerShape


def rank_on(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], seed: int = 0) -> Ranking:
    """`rank_layers` with cross-entropy, batches moved to the model's device."""
    device = next(model.parameters()).device
    moved = ((inputs.to(device), target.to(device)) for inputs, target in batches)
    return rank_layers(model, moved, nn.functional.cross_entropy, seed=seed)


def rank_on_noise(
    model: nn.Module,
    image_size: int,
    *,
    batch_size: int = 8,
    steps: int = 4,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Ranking:
    """A first ranking without data: noise for images, random labels; and a word about it to `say`."""
    say(f"no data or ranking given: a quick ranking on {steps} x {batch_size} random images and labels, seed {seed}")
    classes: Any = getattr(model, "num_classes", 0) or model.num_features
    return rank_on(model, random_batches(image_size, classes, batch_size=batch_size, steps=steps, seed=seed), seed)


def load_ranking(path: str, model: nn.Module, image_size: int) -> Ranking:
    """Read a ranking and check that it was measured on this model at this image size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another model or size.
    """
    ranking = Ranking.load(path)
    check_shapes(path, {layer.name: layer.shape for layer in ranking.layers}, model, image_size)
    return ranking


def load_plan(path: str, model: nn.Module, image_size: int, batch_size: int = 1) -> Plan:
    """Read a plan and check that it was made for this model, image size and batch; raises as `load_ranking`."""
    plan = Plan.load(path)
    if plan.cost.unit == "bytes" and plan.micro_batch is None and batch_size > plan.cost.batch_size:
        raise ValueError(f"{path}: counts the bytes of {plan.cost.batch_size} samples, a batch of {batch_size} would "
                         "keep more: plan with that --batch-size")  # fmt: skip
    check_shapes(path, plan.shapes, model, image_size)
    return plan


def check_shapes(path: str, shapes: Mapping[str, LayerShape], model: nn.Module, image_size: int) -> None:
    """Raises ValueError where the layers of a file are not those of the model, or see inputs of another size.

    A plan of another image size would run, but its budget would be wrong.
    """
    own = {layer.name: layer.shape for layer in rank_on_noise(model, image_size, batch_size=1, steps=1).layers}
    strange = sorted(shapes.keys() ^ own.keys())
    if strange:
        place = "the file" if strange[0] in shapes else "the model"
        raise ValueError(f"{path}: made for another model, layer {strange[0]!r} is only in {place}; rank this model")
    for name, shape in shapes.items():
        if shape != own[name]:
            raise ValueError(f"{path}: made for another model or image size: layer {name!r} is {_sizes(shape)} there, "
                             f"{_sizes(own[name])} in this model at {image_size} px; rank this model")  # fmt: skip


def describe(plan: Plan, net: str) -> dict[str, Any]:
    """The plan as one JSON object, with what it is expected to save."""
    elements = CostModel(depthwise=plan.cost.depthwise)
    savings = plan.expected()
    return {
        "net": net,
        "budget": plan.budget,
        "unit": plan.cost.unit,
        "cost_model": plan.cost.depthwise,
        "batch_size": plan.cost.batch_size,
        "memory": plan.memory,
        "micro_batch": plan.micro_batch,
        "k": len(plan.pool),
        "pool": list(plan.pool),
        "pool_elements": sum(
            plan.shapes[name].in_channels * elements.channel_cost(plan.shapes[name]) for name in plan.pool
        ),
        "pool_cost": plan.pool_cost,
        "total_elements": plan.total_elements,
        "smallest_budget": smallest_budget(plan)[1],
        "expected": {
            "channels": savings.channels,
            "used": savings.used,
            "weight_saving": savings.weight_saving,
            "activation_saving": savings.activation_saving,
            "wgrad_flops_saving": savings.wgrad_flops_saving,
            "dgrad_flops_saving": savings.dgrad_flops_saving,
            "forward_flops": savings.forward_flops,
            "dgrad_flops": savings.dgrad_flops,
            "wgrad_flops": savings.wgrad_flops,
        },
        "head": list(plan.head),
        "fill": plan.fill,
        "sampler": plan.sampler,
        "dgrad_budget": plan.dgrad_budget,
        "correction_cap": plan.correction_cap,
        "store": plan.store,
        "seed": plan.seed,
        "fingerprint": plan.fingerprint,
    }


def ledgers(model: nn.Module, plan: Plan, image_size: int, batch_size: int) -> dict[str, Ledger]:
    """What a training step is predicted to take: fine-tuning of everything, and under the plan in epoch 0."""
    shape = (batch_size, 3, image_size, image_size)
    try:
        return {"full": ledger(model, None, shape), "trady": ledger(model, plan, shape)}
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(f"--batch-size {batch_size}: BatchNorm of full fine-tuning wants more samples") from error


def smallest_budget(plan: Plan) -> tuple[str, int]:
    """The layer of the pool with the cheapest channel, and what that channel costs."""
    costs = {name: plan.cost.channel_cost(plan.shapes[name]) for name in plan.pool}
    name = min(costs, key=lambda layer: costs[layer])
    return name, costs[name]


def mean_channels(plan: Plan, epochs: int = 300) -> dict[str, float]:
    """How many channels of each layer of the pool an epoch draws, on average."""
    draws = [plan.sample(epoch) for epoch in range(epochs)]
    return {name: sum(len(draw[name]) for draw in draws) / epochs for name in plan.pool}


def parse_budget_option(text: str) -> int | str:
    """The option's text as `make_plan` wants it: a whole number of elements, or bytes such as "256KiB"."""
    try:
        return int(text)
    except ValueError:
        return text


def pick_device(name: str | None) -> torch.device:
    """The device of that name, by default a GPU where there is one.

    Raises:
        ValueError: torch does not know the device, or it is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r}: {shorten(str(error), 200)}") from error
    return device


def _sizes(shape: LayerShape) -> str:
    kernel = "x".join(map(str, shape.kernel_size)) or "linear"
    return f"{shape.in_channels}->{shape.out_channels} {kernel} on {shape.in_positions} positions"
