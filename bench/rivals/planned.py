"""Plans on our lean layers: TraDy itself, static choices of channels, last blocks with all below exactly frozen."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from trady_triton import Plan, TraDyOptimizer, apply_plan, choose_recompute
from trady_triton.bench.training import Setup, Training, UnavailableError
from trady_triton.sampling import Scores, Selection, fill


@dataclass(frozen=True)
class FixedPlan(Plan):
    """A plan whose every epoch trains the same channels."""

    channels: Selection = field(default_factory=Selection)

    def sample(self, epoch: int, scores: Scores | None = None) -> Selection:
        """Always `channels`."""
        return self.channels


def trady(model: nn.Module, setup: Setup) -> Training:
    """A fresh random draw every epoch, and blocks recomputed where that keeps half or less, as `trady` does it."""
    return under(choose_recompute(setup.plan(setup.options["budget"]), model, setup.input_shape), model, setup)


def trady_lean(model: nn.Module, setup: Setup) -> Training:
    """The same with nothing recomputed."""
    return under(setup.plan(setup.options["budget"]), model, setup)


def last_blocks(model: nn.Module, setup: Setup) -> Training:
    """All weights of the last blocks, on lean layers: the strongest cheap rival."""
    top = set(setup.top(model, setup.last_blocks))
    layers = [layer.name for layer in setup.ranking.layers if layer.name in top]
    return static(setup.plan("1024GiB", layers=layers), model, setup)


def su_static(model: nn.Module, setup: Setup) -> Training:
    """Sparse Update's static choice: the channels of the pool with the largest weights, the same in every epoch."""
    plan = setup.plan()
    sizes = {name: _channel_sizes(model.get_submodule(name)) for name in plan.pool}
    return static(_fixed(plan, sizes), model, setup)


def paca_static(model: nn.Module, setup: Setup) -> Training:
    """PaCA's static choice: random input features of Linear layers, the same in every epoch."""
    linear = [layer.name for layer in setup.ranking.layers if not layer.shape.kernel_size]
    if not linear:
        raise UnavailableError("PaCA trains Linear layers only, and this network has none beside its head")
    return static(setup.plan(layers=linear, sampler="paca"), model, setup)


def static(plan: Plan, model: nn.Module, setup: Setup) -> Training:
    """A plan whose epochs all train the same channels, applied."""
    training = under(plan, model, setup)
    training.start_epoch = None
    return training


def under(plan: Plan, model: nn.Module, setup: Setup) -> Training:
    """A plan applied, and its optimizer."""
    apply_plan(model, plan)
    optimizer = TraDyOptimizer(model.parameters(), plan, lr=setup.lr)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return Training(model, optimizer, trained, plan, optimizer.resample)


def _channel_sizes(layer: Any) -> Tensor:
    """Norm of the weights that each input channel reaches, [C]."""
    weight = layer.weight.detach()
    groups = getattr(layer, "groups", 1)
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1).norm(dim=(1, 3)).flatten()


def _fixed(plan: Plan, scores: dict[str, Tensor]) -> FixedPlan:
    """The channels of the highest scores that fill the budget."""
    names = [name for name in scores for _ in scores[name]]
    ids = [channel for name in scores for channel in range(len(scores[name]))]
    order = torch.argsort(torch.cat(list(scores.values())), descending=True, stable=True).tolist()
    taken = fill([plan.cost.channel_cost(plan.shapes[names[i]]) for i in order], plan.budget, "skip")
    drawn: dict[str, list[int]] = {}
    for position in taken:
        drawn.setdefault(names[order[position]], []).append(ids[order[position]])
    chosen = Selection((name, tuple(sorted(channels))) for name, channels in drawn.items())
    return FixedPlan(**{f.name: getattr(plan, f.name) for f in fields(Plan)}, channels=chosen)
