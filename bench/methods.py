"""The table of methods: name -> how it is built, what its gradients must be, what it needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from trady_triton.bench.rivals import adapters, checkpointing, compiled, compressed, optimizers, partial, planned
from trady_triton.bench.training import Setup, Training, UnavailableError


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        label: for tables.
        build: sets it up on a plain model, which it may change.
        contract: one of `gate.CONTRACTS`.
        options: for its `setup.options`; `lossless` are the ones under which an approximation must be exact.
        package: that it needs beside the library.
        budget: 0, 1 or 2: which of the setup's budgets its plan has; None without a plan.
        is_compiled: the code of torch.compile does not pass through the dispatcher, where bytes and FLOPs are counted.
        is_costly: compiling takes so long that settings.json says on which nets it runs.
    """

    label: str
    build: Callable[[nn.Module, Setup], Training]
    contract: str = "dense"
    options: dict[str, Any] = field(default_factory=dict)
    lossless: dict[str, Any] = field(default_factory=dict)
    package: str | None = None
    budget: int | None = None
    is_compiled: bool = False
    is_costly: bool = False

    @property
    def is_key(self) -> bool:
        """Whether it is TraDy or one of the rivals that decide."""
        return self.build in _KEY

    def set_up(self, model: nn.Module, setup: Setup, lossless: bool = False) -> Training:
        """Build it.

        Raises:
            UnavailableError: a package is missing, or the network is none that it can train.
        """
        if self.package and importlib.util.find_spec(self.package) is None:
            raise UnavailableError(f"package {self.package} is not installed: pip install 'trady-triton[bench]'")
        options = {**self.options, **(self.lossless if lossless else {})}
        if self.budget is not None:
            options["budget"] = setup.budgets[self.budget]
        torch.manual_seed(0)
        return self.build(model, replace(setup, options=options))


_KEY = (partial.full, partial.head_only, partial.last_blocks, partial.pool_dense, checkpointing.full,
        checkpointing.pool_dense, adapters.lora, planned.trady, planned.trady_lean, planned.last_blocks)  # fmt: skip

METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", partial.full),
    "full-ckpt": Method("full, timm checkpointing", checkpointing.full),
    "full-compiled": Method("full, torch.compile", compiled.full, is_compiled=True, is_costly=True),
    "full-compiled-budget": Method("full, torch.compile, activation_memory_budget=0.3", compiled.full_within_budget,
                                   is_compiled=True, is_costly=True),
    "head": Method("head only", partial.head_only),
    "bias": Method("biases and head", partial.bias_only),
    "last": Method("last 2 blocks", partial.last_blocks),
    "last-lean": Method("last 2 blocks' weights, lean layers", planned.last_blocks, "channels"),
    "pool": Method("TraDy's pool, dense", partial.pool_dense),
    "pool-ckpt": Method("TraDy's pool, dense, timm checkpointing", checkpointing.pool_dense),
    "pool-int8": Method("TraDy's pool, dense, inputs kept in int8", compressed.int8, "approximate"),
    "pool-asi": Method("TraDy's pool, dense, low-rank inputs (ASI)", compressed.asi, "approximate",
                       lossless={"elements": 1 << 62}),
    "random-block": Method("a random block an epoch (LISA)", partial.random_block),
    "badam": Method("BAdam around SGD", optimizers.badam, "optimizer", package="badam"),
    "lora": Method("LoRA r=8 (peft), no grouped convolutions", adapters.lora, "adapter", package="peft"),
    "loha": Method("LoHa r=8 (peft), no grouped convolutions", adapters.loha, "adapter", package="peft"),
    "adamw": Method("full, AdamW", optimizers.adamw, "optimizer"),
    "adamw-torchao": Method("full, 8-bit AdamW (torchao)", optimizers.adamw_torchao, "optimizer", package="torchao",
                            is_costly=True),
    "adamw-bnb": Method("full, 8-bit AdamW (bitsandbytes)", optimizers.adamw_bitsandbytes, "optimizer",
                        package="bitsandbytes"),
    "galore": Method("full, GaLore AdamW r=8", optimizers.galore, "optimizer", package="galore_torch"),
    "apollo": Method("full, APOLLO AdamW r=8", optimizers.apollo, "optimizer", package="apollo_torch"),
    "su": Method("static channels by weight (SU)", planned.su_static, "channels", budget=1),
    "paca": Method("static random features (PaCA)", planned.paca_static, "channels", budget=1),
    "trady-small": Method("TraDy, small budget", planned.trady, "channels", budget=0),
    "trady": Method("TraDy, middle budget", planned.trady, "channels", budget=1),
    "trady-large": Method("TraDy, large budget", planned.trady, "channels", budget=2),
    "trady-lean": Method("TraDy, middle budget, nothing recomputed", planned.trady_lean, "channels", budget=1),
}  # fmt: skip


def in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of the table."""
    order = list(METHODS)
    return sorted(rows, key=lambda row: order.index(row["method"]))
