"""What users give an optimizer: parameters or groups of them, and options; read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from trady_triton.cost import CostModel
from trady_triton.optim.states import ALGORITHMS, STATE_POLICIES, state_names

_OPTIONS = {"momentum", "nesterov", "dampening", "betas", "eps", "amsgrad", "maximize", "differentiable"}


def listed(params: Iterable[Any]) -> list[Any]:
    """Parameters or groups, with lists in place of iterators that could be read only once."""
    if isinstance(params, Tensor):
        raise TypeError("params is a Tensor: wanted an iterable of parameters or of groups")
    return [
        {**item, "params": list(item["params"])}
        if isinstance(item, dict) and not isinstance(item["params"], Tensor)
        else item
        for item in params
    ]


def tensors_in(groups: Iterable[Any]) -> Iterator[Tensor]:
    """Every tensor in parameters, named parameters or groups."""
    for item in groups:
        if isinstance(item, dict):
            yield from tensors_in([item["params"]] if isinstance(item["params"], Tensor) else item["params"])
        else:
            yield item[1] if isinstance(item, tuple) else item


def defaults_of(
    algorithm: str, momentum: float, nesterov: bool, betas: tuple[float, float], eps: float
) -> dict[str, Any]:
    """The options of an algorithm that groups hold, beside learning rate and weight decay.

    Raises:
        ValueError: an unknown algorithm, or an option of another one.
    """
    _check_choice("algorithm", algorithm, ALGORITHMS)
    if algorithm == "sgd":
        if (tuple(betas), eps) != ((0.9, 0.999), 1e-8):
            raise ValueError(f"betas {betas!r}, eps {eps!r}: are of AdamW, SGD has momentum")
        return {"momentum": momentum, "nesterov": nesterov}
    if momentum or nesterov:
        raise ValueError(f"momentum {momentum!r}, nesterov {nesterov!r}: are of SGD, AdamW has betas")
    return {"betas": betas, "eps": eps}


def check_whole(state_policy: str, resample_every: int | str, max_grad_norm: float | None, average_at: str) -> None:
    """Raises ValueError for options that do not belong to a group."""
    _check_choice("state_policy", state_policy, STATE_POLICIES)
    _check_choice("average_at", average_at, ("step", "backward"))
    is_count = isinstance(resample_every, int) and not isinstance(resample_every, bool) and resample_every >= 1
    if not is_count and resample_every != "epoch":
        raise ValueError(f"resample_every {resample_every!r}: wanted 'epoch' or a number of steps of at least 1")
    if max_grad_norm is not None and not (_is_number(max_grad_norm) and max_grad_norm > 0):
        raise ValueError(f"max_grad_norm {max_grad_norm!r}: wanted None or a number above 0")


def check_group(options: Mapping[str, Any], algorithm: str, cost: CostModel) -> None:
    """Raises ValueError for a number out of range, an option of torch.optim that is none here, or uncounted states."""
    own = ("betas", "eps") if algorithm == "adamw" else ("momentum", "nesterov")
    for name in _OPTIONS - {*own}:
        if options.get(name):
            raise ValueError(f"{name} {options[name]!r}: algorithm {algorithm!r} has {' and '.join(own)} alone")
    for name in ("lr", "weight_decay", "momentum", "eps"):
        value = options.get(name, 0.0)
        if not (_is_number(value) and float(value) >= 0):
            raise ValueError(f"{name} {value!r}: wanted a number of at least 0")
    betas = options.get("betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas {betas!r}: wanted two numbers in [0, 1)")
    if options.get("nesterov") and not options["momentum"]:
        raise ValueError("nesterov: wanted a momentum above 0")
    check_states(options, algorithm, cost)


def check_states(options: Mapping[str, Any], algorithm: str, cost: CostModel) -> None:
    """Raises ValueError for states that the plan has not counted."""
    states = len(state_names(algorithm, options))
    if cost.unit == "bytes" and states > cost.states:
        kind = "adamw" if algorithm == "adamw" else "momentum"
        raise ValueError(
            f"{kind} keeps {states} states of every drawn weight, the plan's budget counts {cost.states}: make the "
            f"plan with optimizer={kind!r}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | Tensor) and not isinstance(value, bool)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r}: wanted one of {', '.join(choices)}")
