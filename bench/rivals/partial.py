"""Training in plain torch: everything, the head, biases, the last blocks, a pool of layers, random blocks."""

from __future__ import annotations

import random

from torch import nn
from torch.optim import SGD

from trady_triton.bench.training import Setup, Training, freeze, sgd
from trady_triton.nn import blocks


def full(model: nn.Module, setup: Setup) -> Training:
    """Every parameter."""
    return sgd(model, setup, {name for name, _ in model.named_parameters()})


def head_only(model: nn.Module, setup: Setup) -> Training:
    """The classifier alone."""
    return sgd(model, setup, setup.inside(setup.head, model))


def bias_only(model: nn.Module, setup: Setup) -> Training:
    """Every bias, those of normalisation too, and the head (TinyTL's biases, BitFit)."""
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    return sgd(model, setup, biases | setup.inside(setup.head, model))


def last_blocks(model: nn.Module, setup: Setup) -> Training:
    """The last blocks and the head, their normalisation too."""
    return sgd(model, setup, setup.inside((*setup.top(model, setup.last_blocks), *setup.head), model))


def pool_dense(model: nn.Module, setup: Setup) -> Training:
    """All weights of the layers that TraDy draws from, and the head."""
    pool = {f"{name}.weight" for name in setup.pool}
    return sgd(model, setup, pool | setup.inside(setup.head, model))


def drawn_dense(model: nn.Module, setup: Setup) -> Training:
    """All weights of the layers that TraDy's epoch draws from, and the head."""
    head, plan = setup.inside(setup.head, model), setup.plan(setup.options["budget"])
    trained = set(head)

    def start_epoch(epoch: int) -> None:
        trained.clear()
        trained.update(head | {f"{name}.weight" for name in plan.sample(epoch)})
        list(freeze(model, trained))

    return Training(model, SGD(model.parameters(), lr=setup.lr), trained, start_epoch=start_epoch)


def random_block(model: nn.Module, setup: Setup) -> Training:
    """LISA's idea: one block an epoch, drawn at random, and the head."""
    head, names = setup.inside(setup.head, model), blocks(model)
    trained = set(head)

    def start_epoch(epoch: int) -> None:
        trained.clear()
        trained.update(head | setup.inside([random.Random(epoch).choice(names)], model))
        list(freeze(model, trained))

    return Training(model, SGD(model.parameters(), lr=setup.lr), trained, start_epoch=start_epoch)
