"""Fine-tune pretrained networks inside a strict memory budget (TraDy, ICLR 2026)."""

from trady_triton.choose import choose_recompute
from trady_triton.delta import apply_delta, save_delta
from trady_triton.ledger import Ledger, ledger, measure
from trady_triton.microbatch import backward_in_parts
from trady_triton.nn import apply_plan, remove_plan
from trady_triton.optimizer import TraDyOptimizer
from trady_triton.plan import Plan
from trady_triton.planner import make_plan
from trady_triton.policy import Policy
from trady_triton.ranking import Ranking, rank_layers

__all__ = [
    "Ledger",
    "Plan",
    "Policy",
    "Ranking",
    "TraDyOptimizer",
    "apply_delta",
    "apply_plan",
    "backward_in_parts",
    "choose_recompute",
    "ledger",
    "make_plan",
    "measure",
    "rank_layers",
    "remove_plan",
    "save_delta",
]
