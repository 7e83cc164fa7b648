"""What SGD and AdamW keep from step to step, and what becomes of it when channels are drawn anew.

Of the drawn channels K of a weight a state has the shape of the compact gradient, [K, O/G, *kernel_size]; nothing is
kept of any other channel. Of what is trained whole a state has the parameter's shape. Names are those of torch.optim.
States of channels are float32 (float64 for float64), also where the weight is narrower. AdamW counts the steps of every
channel, [K] float32 on the CPU: its bias correction is that of the channel's own age.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trady_triton.slot import ChannelSlot

ALGORITHMS = ("sgd", "adamw")
STATE_POLICIES = ("carry", "reset")

State = dict[str, Tensor]


def state_names(algorithm: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors of the gradient's shape that an algorithm keeps under the options of a group."""
    if algorithm == "adamw":
        return "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if group["momentum"] else ()


def state_shapes(
    algorithm: str, group: Mapping[str, Any], shape: tuple[int, ...], is_channels: bool
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every state of a gradient of that shape; none where no channel is drawn."""
    if is_channels and shape[0] == 0:
        return {}
    shapes = dict.fromkeys(state_names(algorithm, group), shape)
    return shapes | ({"step": shape[: int(is_channels)]} if algorithm == "adamw" else {})


def fill_channel_state(state: State, slot: ChannelSlot, algorithm: str, group: Mapping[str, Any]) -> State:
    """Complete the state of a slot's drawn channels, in place: zeros for what is not there yet.

    A momentum that was turned off leaves nothing, here and below.
    """
    _drop_momentum(state, algorithm, group)
    dtype = torch.float64 if slot.proxy.dtype == torch.float64 else torch.float32
    for name, shape in state_shapes(algorithm, group, tuple(slot.proxy.shape), True).items():
        if name not in state:
            on_cpu = name == "step"
            state[name] = torch.zeros(shape) if on_cpu else torch.zeros(shape, dtype=dtype, device=slot.proxy.device)
    return state


def carry_(state: State, channels: Tensor, old: State, old_channels: Tensor) -> None:
    """Copy into the state of a draw what an earlier draw has of the same channels; ids ascending, [K] and [K']."""
    if not state or not old:
        return
    old_channels = old_channels.to(channels.device)
    there = torch.searchsorted(old_channels, channels).clamp_(max=len(old_channels) - 1)
    again = old_channels[there] == channels
    for name, value in state.items():  # no boolean index: its size would have to come back from the device
        kept = old[name][there.to(old[name].device)].to(value)
        value.copy_(kept.where(again.to(value.device).view(-1, *[1] * (value.dim() - 1)), value))


def fill_whole_state(state: State, parameter: Tensor, algorithm: str, group: Mapping[str, Any]) -> State:
    """Complete the state of a parameter that is trained whole, in place: zeros for what is not there yet.

    What is there follows a parameter that was moved to another device or dtype.
    """
    _drop_momentum(state, algorithm, group)
    for name in state_names(algorithm, group):
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        elif state[name].device != parameter.device or state[name].dtype != parameter.dtype:
            state[name] = state[name].to(parameter.device, parameter.dtype)
    if algorithm == "adamw" and "step" not in state:
        state["step"] = torch.tensor(0.0)  # fake tensors know the value of this, not of zeros(())
    return state


def _drop_momentum(state: State, algorithm: str, group: Mapping[str, Any]) -> None:
    if "momentum_buffer" not in state_names(algorithm, group):
        state.pop("momentum_buffer", None)


def load_(state: State, saved: Mapping[str, Tensor]) -> None:
    """Fill a state with saved values, which keep their precision: nothing passes through the parameter's dtype."""
    for name, value in state.items():
        value.copy_(saved[name])


def check_saved_groups(
    saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], sizes: Sequence[int]
) -> None:
    """Raises ValueError where the groups of a state_dict are of another plan, rule or size; sizes: trained whole."""
    found, plan = {group.get("trady_plan") for group in saved}, own[0]["trady_plan"]
    if found != {plan}:
        raise ValueError(f"the state belongs to plan {found}, this optimizer runs plan {plan}")
    if any(("betas" in group) != ("betas" in own[0]) for group in saved):
        raise ValueError(f"the state belongs to another algorithm than {'adamw' if 'betas' in own[0] else 'sgd'!r}")
    if any(group.get("trady_every") != own[0]["trady_every"] for group in saved):
        every = [group.get("trady_every") for group in saved]
        raise ValueError(f"the state was drawn anew every {every}, this optimizer has {own[0]['trady_every']!r}")
    if list(sizes) != (found_sizes := [len(group["params"]) for group in saved]):
        raise ValueError(f"the state has groups of {found_sizes} parameters trained whole, this optimizer of {sizes}")


def check_saved(wanted: Mapping[str, tuple[int, ...]], saved: Mapping[str, Tensor], name: str) -> None:
    """Raises ValueError where saved values do not fit the wanted states, by name or by shape."""
    found = {key: tuple(value.shape) for key, value in saved.items()}
    if dict(wanted) != found:
        raise ValueError(f"state of {name!r}: got {found}, wanted {dict(wanted)}")
