"""TraDyOptimizer in timm's registry: `create_optimizer_v2(model, opt="trady", ...)` on a model that has a plan.

A plan in bytes must have counted the state: `make_plan(..., optimizer="momentum")` or "adamw".
"""

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


for info in (
    OptimInfo("trady", trady, "SGD on the channels that a plan draws", has_eps=False),
    OptimInfo("tradymomentum", trady, "the same with momentum", has_eps=False, has_momentum=True),
    OptimInfo("tradyadamw", trady, "AdamW on the drawn channels", has_betas=True, defaults={"algorithm": "adamw"}),
):
    default_registry.register(info)
