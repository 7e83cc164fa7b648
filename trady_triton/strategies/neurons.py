"""NEq and Velocity, which choose output neurons: by how fast a neuron's response to held-out data still changes.

A neuron's gradient needs the whole input of its layer, so nothing of the store is saved. Such a draw therefore holds
all input channels of each chosen layer, which is what is really kept, and names the output channels that are updated:
the compact gradient of the layer is computed whole and the other outputs are set to 0 in the step. What is charged
against the budget is the published count. dW's bytes and FLOPs of the frozen neurons are not saved here.
"""

from __future__ import annotations

from math import prod

import torch

from trady_triton.sampling import Pool, Scores, Selection, Unit, epoch_generator, fill

NEQ_EPS = 1e-3


def draw_velocity(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """Output neurons by |v| / cost, highest first; cost counts weights only (Velocity, arXiv 2312.05282).

    cost = C * prod(kernel_size), which ignores groups, as the published code does: a depthwise neuron is charged C
    times too much and is hardly ever chosen. Without scores, in the first epoch, the order is random. The published
    runs take the weight part of a budget; so the stored inputs are not bounded by it.
    """
    order = _order(pool, scores, epoch, {name: weight_cost(pool, name) for name in pool.shapes})
    costs = [weight_cost(pool, name) for name, _ in order]
    taken = fill(costs, pool.budget, "stop")
    return _outputs(pool, [order[i] for i in taken], sum(costs[i] for i in taken))


def draw_velocity_full(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """Velocity under a budget that also pays for the inputs: a layer's first neuron is charged its whole input.

    The order is by |v| over the neuron's weights and its share of the input; what does not fit is passed over. Ours,
    to compare at equal memory. Weights are counted with the groups.
    """
    inputs = {n: shape.in_channels * pool.cost.activation_cost(shape) for n, shape in pool.shapes.items()}
    weights = {
        n: shape.in_channels * pool.cost.gradient_cost(shape) / shape.out_channels for n, shape in pool.shapes.items()
    }
    worth = {name: weights[name] + inputs[name] / shape.out_channels for name, shape in pool.shapes.items()}
    taken: list[Unit] = []
    opened: set[str] = set()
    used = 0.0
    for name, neuron in _order(pool, scores, epoch, worth):
        cost = weights[name] + (0 if name in opened else inputs[name])
        if used + cost <= pool.budget:
            used += cost
            opened.add(name)
            taken.append((name, neuron))
    return _outputs(pool, taken, int(used + 0.5))


def draw_neq(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """Every neuron with |v| above 1e-3, in the first epoch all; no budget (NEq, Bragagnolo et al. 2022)."""
    chosen = [
        (name, neuron)
        for name, shape in pool.shapes.items()
        for neuron in range(shape.out_channels)
        if scores is None or abs(float(scores[name][neuron])) > NEQ_EPS
    ]
    drawn = _outputs(pool, chosen, None)
    drawn.charged = sum(len(ids) * pool.costs[name] for name, ids in drawn.items())
    return drawn


def weight_cost(pool: Pool, name: str) -> int:
    """Velocity's charge for one output neuron, in the pool's unit."""
    shape = pool.shapes[name]
    return shape.in_channels * prod(shape.kernel_size) * pool.cost.gradient_itemsize


def _order(pool: Pool, scores: Scores | None, epoch: int, costs: dict[str, int] | dict[str, float]) -> list[Unit]:
    neurons = [(name, neuron) for name, shape in pool.shapes.items() for neuron in range(shape.out_channels)]
    if scores is None:
        generator = epoch_generator(pool.seed, epoch)
        return [neurons[i] for i in torch.randperm(len(neurons), generator=generator).tolist()]
    worth = {name: (scores[name].double().abs() / costs[name]).tolist() for name in pool.shapes}
    return sorted(neurons, key=lambda unit: -worth[unit[0]][unit[1]])


def _outputs(pool: Pool, neurons: list[Unit], charged: int | None) -> Selection:
    chosen: dict[str, list[int]] = {}
    for name, neuron in neurons:
        chosen.setdefault(name, []).append(neuron)
    layers = [name for name in pool.shapes if name in chosen]
    return Selection(
        ((name, tuple(range(pool.shapes[name].in_channels))) for name in layers),
        outputs={name: tuple(sorted(chosen[name])) for name in layers},
        charged=charged,
    )
