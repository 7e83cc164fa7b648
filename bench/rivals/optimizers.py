"""Full fine-tuning under optimizers that save state: 8-bit AdamW, GaLore, APOLLO, BAdam; and AdamW for comparison."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW

from trady_triton.bench.training import Setup, Training, freeze
from trady_triton.nn import blocks

RANK = 8


def adamw(model: nn.Module, setup: Setup) -> Training:
    """torch.optim.AdamW."""
    return _full(model, AdamW(model.parameters(), lr=setup.lr))


def adamw_torchao(model: nn.Module, setup: Setup) -> Training:
    """torchao's AdamW8bit. On the CPU its step is not compiled: that takes minutes, and hides bytes from the meter."""
    from torchao.optim import AdamW8bit

    optimizer = AdamW8bit(model.parameters(), lr=setup.lr)
    if setup.net.device == "cpu":
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
    return _full(model, optimizer)


def adamw_bitsandbytes(model: nn.Module, setup: Setup) -> Training:
    """bitsandbytes' AdamW8bit."""
    from bitsandbytes.optim import AdamW8bit

    return _full(model, AdamW8bit(model.parameters(), lr=setup.lr))


def galore(model: nn.Module, setup: Setup) -> Training:
    """GaLoreAdamW, all weights projected to rank 8."""
    from galore_torch import GaLoreAdamW

    extra = {"rank": RANK, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return _full(model, GaLoreAdamW(_groups(model, extra), lr=setup.lr, no_deprecation_warning=True))


def apollo(model: nn.Module, setup: Setup) -> Training:
    """APOLLOAdamW, all weights projected to rank 8."""
    from apollo_torch import APOLLOAdamW

    extra = {"rank": RANK, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std", "proj": "random",
             "scale_type": "channel"}  # fmt: skip
    return _full(model, APOLLOAdamW(_groups(model, extra), lr=setup.lr, no_deprecation_warning=True))


def badam(model: nn.Module, setup: Setup) -> Training:
    """BAdam's BlockOptimizer around SGD: a random block at a time, another one each epoch, and the head."""
    from badam import BlockOptimizer

    prefixes, named = [[name] for name in blocks(model)], list(model.named_parameters())
    options = {"switch_block_every": 1 << 60, "switch_mode": "fixed", "start_block": 0, "verbose": 0}
    base = SGD(model.parameters(), lr=setup.lr)
    optimizer = BlockOptimizer(base, named, prefixes, active_modules=list(setup.head), **options)

    def start_epoch(epoch: int) -> None:
        optimizer.current_block_idx = random.Random(epoch).randrange(len(prefixes))
        optimizer.switch_trainable_params()

    return Training(model, optimizer, {name for name, _ in named}, start_epoch=start_epoch)


def _groups(model: nn.Module, extra: dict[str, Any]) -> list[dict[str, Any]]:
    """Matrices are projected; a network that has convolutions instead gets those projected."""
    kinds = [[m.weight for m in model.modules() if isinstance(m, kind)] for kind in (nn.Linear, nn.Conv2d)]
    weights = kinds[0] if len(kinds[0]) > 1 else kinds[1]
    chosen = {id(weight) for weight in weights}
    return [{"params": [p for p in model.parameters() if id(p) not in chosen]}, {"params": weights, **extra}]


def _full(model: nn.Module, optimizer: torch.optim.Optimizer) -> Training:
    trained = {name for name, _ in model.named_parameters()}
    list(freeze(model, trained))
    return Training(model, optimizer, trained)
