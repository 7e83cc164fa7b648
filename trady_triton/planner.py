"""make_plan as users call it: for a budget of channels, or for the memory of the whole step."""

from __future__ import annotations

from typing import Any

from torch import nn

from trady_triton import plan as plans
from trady_triton.batch import Shape
from trady_triton.plan import Plan
from trady_triton.ranking import Ranking
from trady_triton.search import fit_memory
from trady_triton.strategies import strategy


def make_plan(
    ranking: Ranking,
    *,
    budget: int | str | None = None,
    memory: int | str | None = None,
    model: nn.Module | None = None,
    input_shape: Shape | None = None,
    **options: Any,
) -> Plan:
    """Choose the pool of layers and fix the budget.

    Either `budget` says what the drawn channels may cost (see `trady_triton.plan.make_plan`, which has all options),
    or `memory` what a whole training step may take, weights included; the budget, and if need be what is recomputed, a
    micro-batch and more, are then chosen such that every step of every epoch stays within it (see
    `trady_triton.search.fit_memory`).

    Args:
        ranking: what `rank_layers` measured.
        budget: elements for one sample as an integer, or bytes such as "256KiB".
        memory: bytes of the whole step, such as "2GiB".
        model: the model, for `memory`.
        input_shape: of the batch, as for `ledger`, for `memory`.
        options: such as coverage, k, layers, fill, seed, policy; for a budget batch_size and dtypes, for a memory
            allow, micro_batch, target, loss_fn, autocast.

    Raises:
        ValueError: an option out of its range, or a budget or memory in which no channel can be trained: the message
            names the smallest that works.
    """
    if budget is not None and memory is not None:
        raise ValueError(f"budget {budget!r} and memory {memory!r}: wanted one of them")
    if memory is None:
        return plans.make_plan(ranking, budget=budget, **options)
    sampler = options.get("sampler", "trady")
    chosen = strategy(sampler)
    if chosen.layers == "scheme":
        raise ValueError(f"memory: sampler {sampler!r} trains its scheme whatever the memory; give a budget instead")
    if not chosen.has_budget or chosen.scores != "none" or options.get("correction_cap") is not None:
        raise ValueError(f"memory: sampler {sampler!r} may keep more than its draws; give a budget instead")
    if model is None or input_shape is None:
        raise ValueError("memory: wanted model and input_shape as well, from which the step's peak is predicted")
    return fit_memory(model, ranking, memory=memory, input_shape=input_shape, **options)
