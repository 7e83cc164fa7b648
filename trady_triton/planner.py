"""make_plan as users call it: for a budget of channels, or for the memory of the whole step."""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from trady_triton import budget_plan
from trady_triton.arguments import expect
from trady_triton.batch import Shape
from trady_triton.plan import Plan
from trady_triton.ranking import Ranking
from trady_triton.search import fit_memory
from trady_triton.strategies import strategy


def make_plan(
    ranking: Ranking | None = None,
    *,
    budget: int | str | None = None,
    memory: int | str | None = None,
    model: nn.Module | None = None,
    input_shape: Shape | None = None,
    **options: Any,
) -> Plan:
    """Choose the pool of layers and fix the budget.

    Either `budget` says what the drawn channels may cost (see `trady_triton.budget_plan.make_plan`, which has all
    options), or `memory` what a whole training step may take, weights included; the budget, and if need be what is
    recomputed, a micro-batch and more, are then chosen such that every step of every epoch stays within it (see
    `trady_triton.search.fit_memory`).

    Args:
        ranking: what `rank_layers` measured. None takes the one that is shipped for `model`, and warns of it: which
            layers matter is a property of the network more than of the data (Prop. 3.1).
        budget: elements for one sample as an integer, or bytes such as "256KiB".
        memory: bytes of the whole step, such as "2GiB".
        model: the model, for `memory` or without a ranking.
        input_shape: of the batch, as for `ledger`, for `memory`; a shipped ranking must be of its image size.
        options: of either: coverage or k or layers, which make the pool; sampler, dgrad_budget, fill and seed of the
            draws; cost_model; optimizer, whose state counts; store, "int8" or "int4"; train_bias, train_norm; policy of
            the frozen layers. For a budget also batch_size, dtype, activation_dtype, which decide what a channel costs
            in bytes (1 sample, float32), and correction_cap. For a memory allow, micro_batch, target, loss_fn,
            autocast.

    Raises:
        TypeError: an argument of the wrong kind, or an unknown option.
        ValueError: an option out of its range; no ranking, and none is shipped for the model; or a budget or memory in
            which no channel can be trained: the message names the smallest that works.
    """
    if ranking is None:
        ranking = _shipped(model, input_shape)
    expect("ranking", ranking, Ranking, "which rank_layers measures and Ranking.load reads")
    if budget is not None and memory is not None:
        raise ValueError(f"budget {budget!r} and memory {memory!r}: wanted one of them")
    if memory is None:
        return budget_plan.make_plan(ranking, budget=budget, **options)
    sampler = options.get("sampler", "trady")
    chosen = strategy(sampler)
    if chosen.layers == "scheme":
        raise ValueError(f"memory: sampler {sampler!r} trains its scheme whatever the memory; give a budget instead")
    if not chosen.has_budget or chosen.scores != "none" or options.get("correction_cap") is not None:
        raise ValueError(f"memory: sampler {sampler!r} may keep more than its draws; give a budget instead")
    for name in ("batch_size", "dtype", "activation_dtype"):
        if name in options:
            raise ValueError(f"{name} {options[name]!r}: with a memory it follows from model, input_shape and autocast")
    if model is None or input_shape is None:
        raise ValueError("memory: wanted model and input_shape as well, from which the step's peak is predicted")
    return fit_memory(model, ranking, memory=memory, input_shape=input_shape, **options)


def _shipped(model: nn.Module | None, input_shape: Shape | None) -> Ranking:
    """The ranking of this network that an installed package brings.

    A package does so by an entry point of group `trady_triton.rankings`: (model, image size or None) -> a Ranking or
    None.
    """
    if model is None:
        raise ValueError("ranking None: wanted what rank_layers measured, or the model, for which one may be shipped")
    expect("model", model, nn.Module)
    size = input_shape[-1] if isinstance(input_shape, tuple | list) else None
    for provider in entry_points(group="trady_triton.rankings"):
        ranking: Ranking | None = provider.load()(model, size)
        if ranking is not None:
            warnings.warn(
                f"no ranking given: the plan follows the one of {ranking.steps} steps that is shipped for this network "
                f"({provider.value}); rank_layers measures it on your data",
                stacklevel=3,
            )
            return ranking
    raise ValueError(
        f"ranking None: none is shipped for this {type(model).__name__}"
        + (f" at image size {size}" if size else "")
        + "; measure one with rank_layers(model, batches, loss_fn)"
    )
