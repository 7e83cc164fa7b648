"""LoRA and LoHa through peft on the layers that TraDy draws from, and the head.

Grouped convolutions are left out: peft refuses ranks that their groups do not divide.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import SGD

from trady_triton.bench.training import Setup, Training

RANK = 8


def lora(model: nn.Module, setup: Setup) -> Training:
    """W + B A with A [8, C], B [O, 8]."""
    from peft import LoraConfig

    return _adapted(model, setup, LoraConfig)


def loha(model: nn.Module, setup: Setup) -> Training:
    """W + (B1 A1) * (B2 A2), elementwise."""
    from peft import LoHaConfig

    return _adapted(model, setup, LoHaConfig)


def _adapted(model: nn.Module, setup: Setup, config: Any) -> Training:
    from peft import get_peft_model

    dense = [name for name in setup.pool if getattr(model.get_submodule(name), "groups", 1) == 1]
    wrapped = get_peft_model(model, config(r=RANK, target_modules=dense, modules_to_save=list(setup.head)))
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    return Training(wrapped, SGD(trained.values(), lr=setup.lr), set(trained))
