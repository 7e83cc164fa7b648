"""Every strategy by name: which layers it may draw from, how it draws, and which scores it needs.

A draw is a pure function of (pool, epoch, scores): the same plan, layers and optimizer run all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trady_triton.sampling import Pool, Scores, Selection
from trady_triton.strategies.cyclic import draw_next
from trady_triton.strategies.gradient import draw_by_norm, draw_by_rgn
from trady_triton.strategies.medyate import draw_by_norm_seen
from trady_triton.strategies.neurons import draw_neq, draw_velocity, draw_velocity_full
from trady_triton.strategies.paca import draw_columns
from trady_triton.strategies.sparse_update import draw_largest, draw_random, draw_smallest
from trady_triton.strategies.tinytrain import draw_by_fisher
from trady_triton.strategies.uniform import draw_uniform, uniform_inclusion
from trady_triton.strategies.weighted import draw_weighted, weighted_inclusion
from trady_triton.strategies.whole import draw_everything, draw_nothing, whole_inclusion

Draw = Callable[[Pool, int, Scores | None], Selection]
Inclusion = Callable[[Pool, Scores | None], dict[str, list[float]]]

# Scores without which no channel can be drawn, by their source, and who measures them.
REQUIRED = {
    "weights": "norms of the pretrained weights, which TraDyOptimizer takes itself",
    "gradient": "norms of the gradient over the data, which trady_triton.probes.gradient_scores measures",
    "fisher": "Fisher information of the data, which trady_triton.probes.fisher_scores measures",
}


@dataclass(frozen=True)
class Strategy:
    """How channels are chosen.

    Attributes:
        draw: (pool, epoch, scores) -> Selection.
        layers: "rgn", the best layers by RGN; "lara", by LaRa; "all" that were ranked; "scheme", a given table.
        scores: "none"; "weights", norms of the weights before training; "seen", gradient norms of the channels when
            they were last trained; or what a probe of `trady_triton.probes` measures: "gradient" (an oracle),
            "fisher" or "velocity".
        is_static: epoch 0 serves for all epochs.
        has_budget: whether it is held to one.
        fills: it takes the channels of an order until the budget is full, by the plan's rule; others have their own.
        inclusion: (pool, scores) -> probability of each channel, where that is known.
        trains_bias: biases are trained as well.
    """

    draw: Draw
    layers: str = "all"
    scores: str = "none"
    is_static: bool = False
    has_budget: bool = True
    fills: bool = False
    inclusion: Inclusion | None = None
    trains_bias: bool = False

    @property
    def is_probed(self) -> bool:
        """Whether its scores take passes of their own over data."""
        return self.scores in ("gradient", "fisher", "velocity")

    @property
    def is_self_contained(self) -> bool:
        """Whether a plan is all that its draws need: no passes over data, no scheme of layers."""
        return not self.is_probed and self.layers != "scheme"


STRATEGIES = {
    "trady": Strategy(draw_uniform, layers="rgn", inclusion=uniform_inclusion, fills=True),
    "s-topk": Strategy(draw_uniform, layers="rgn", is_static=True, fills=True),
    "d-full": Strategy(draw_uniform, inclusion=uniform_inclusion, fills=True),
    "s-full": Strategy(draw_uniform, is_static=True, fills=True),
    "d-rgn": Strategy(draw_by_rgn, scores="gradient", fills=True),
    "s-rgn": Strategy(draw_by_rgn, scores="gradient", is_static=True, fills=True),
    "d-norm": Strategy(draw_by_norm, scores="gradient", fills=True),
    "su": Strategy(draw_largest, layers="scheme", scores="weights", is_static=True),
    "su-smallest": Strategy(draw_smallest, layers="scheme", scores="weights", is_static=True),
    "su-random": Strategy(draw_random, layers="scheme", is_static=True),
    "velocity": Strategy(draw_velocity, scores="velocity"),
    "velocity-full": Strategy(draw_velocity_full, scores="velocity"),
    "neq": Strategy(draw_neq, scores="velocity", has_budget=False),
    "paca": Strategy(draw_columns, is_static=True),
    "tinytrain": Strategy(draw_by_fisher, scores="fisher", is_static=True, fills=True),
    "medyate": Strategy(draw_by_norm_seen, layers="lara", scores="seen", fills=True),
    "cyclic": Strategy(draw_next, layers="rgn"),
    "weighted": Strategy(draw_weighted, layers="rgn", scores="seen", inclusion=weighted_inclusion),
    "full": Strategy(draw_everything, has_budget=False, inclusion=whole_inclusion, trains_bias=True),
    "head": Strategy(draw_nothing, has_budget=False),
    "bias": Strategy(draw_nothing, has_budget=False, trains_bias=True),
}


def strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in STRATEGIES:
        raise ValueError(f"sampler {name!r}: wanted one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
