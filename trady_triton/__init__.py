"""Fine-tune pretrained networks inside a strict memory budget (TraDy, ICLR 2026)."""

from trady_triton.nn import apply_plan, choose_recompute, remove_plan
from trady_triton.optimizer import TraDyOptimizer
from trady_triton.plan import Plan, make_plan
from trady_triton.policy import Policy
from trady_triton.ranking import Ranking, rank_layers

__all__ = [
    "Plan",
    "Policy",
    "Ranking",
    "TraDyOptimizer",
    "apply_plan",
    "choose_recompute",
    "make_plan",
    "rank_layers",
    "remove_plan",
]
