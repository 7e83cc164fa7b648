"""What a plan is expected to save, told before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trady_triton.cost import LayerShape


@dataclass(frozen=True)
class Savings:
    """Means over the draws of `epochs` epochs; savings are fractions of training every ranked layer whole.

    `channels` and `used` (in the plan's unit) are per epoch. FLOPs are of one sample in the ranked layers, 2 a
    multiply-add, head excluded; dX is counted for every layer called after the first one that is drawn from.
    """

    epochs: int
    channels: float
    used: float
    weight_saving: float
    activation_saving: float
    wgrad_flops_saving: float
    dgrad_flops_saving: float
    forward_flops: float
    dgrad_flops: float
    wgrad_flops: float

    @property
    def step_flops(self) -> float:
        """FLOPs of a step for one sample: forward, dX and dW."""
        return self.forward_flops + self.dgrad_flops + self.wgrad_flops


def mean_savings(
    shapes: Mapping[str, LayerShape],
    draws: Sequence[Mapping[str, Sequence[int]]],
    used: Sequence[int],
    dgrad: Sequence[int],
    epochs: int,
) -> Savings:
    """Savings of draws from layers of these shapes, each draw with what it is charged and its FLOPs of dX."""
    mean = {name: sum(len(draw.get(name, ())) for draw in draws) / len(draws) for name in shapes}
    drawn = [(shapes[name], count) for name, count in mean.items()]
    weights = sum(shape.weights for shape in shapes.values())
    inputs = sum(shape.inputs for shape in shapes.values())
    forward = sum(shape.dense_flops for shape in shapes.values())
    full_dgrad = forward - next(iter(shapes.values())).dense_flops
    wgrad = sum(count * shape.channel_wgrad_flops for shape, count in drawn)
    mean_dgrad = sum(dgrad) / len(draws)
    return Savings(
        epochs=epochs,
        channels=sum(mean.values()),
        used=sum(used) / len(draws),
        weight_saving=1 - sum(count * shape.channel_weights for shape, count in drawn) / weights,
        activation_saving=1 - sum(count * shape.in_positions for shape, count in drawn) / inputs,
        wgrad_flops_saving=1 - wgrad / forward,
        dgrad_flops_saving=1 - mean_dgrad / max(1, full_dgrad),
        forward_flops=forward,
        dgrad_flops=mean_dgrad,
        wgrad_flops=wgrad,
    )
