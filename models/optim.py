"""TraDyOptimizer in timm's registry: `create_optimizer_v2(model, opt="trady", ...)` on a model that has a plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

from trady_triton.optimizer import TraDyOptimizer


def trady(params: Iterable[Any], **options: Any) -> TraDyOptimizer:
    """TraDyOptimizer on parameters or groups as timm makes them; the plan is found from the parameters.

    Raises:
        TypeError: none of the parameters belongs to a planned model.
        ValueError: timm's layer decay, which leaves out the frozen weights that the plan draws from.
    """
    groups = list(params)
    if any(isinstance(group, dict) and "lr_scale" in group for group in groups):
        raise ValueError(
            "opt 'trady' with layer_decay: timm leaves the weights that the plan draws from out of its groups; give "
            "groups of your own by param_group_fn"
        )
    return TraDyOptimizer(groups, **options)


default_registry.register(OptimInfo("trady", trady, "SGD on the channels that a plan draws", has_eps=False))
