"""Deltas: what training changed in a network, as a small safetensors file, and the way back from base and delta.

Shapes: C input channels, O output channels, G groups, K changed channels. Of a Conv2d or Linear weight only the changed
input channels are stored, channel-major as in a slot: ids [K] and values [K, O/G, *kernel_size]. The head and whatever
else changed, biases and buffers included, is stored whole. "Changed" and "the same" are meant bit for bit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trady_triton.arguments import expect
from trady_triton.ranking import find_head
from trady_triton.serial import written_whole

FORMAT, VERSION = "trady_triton.delta", "1"
WHOLE, CHANNELS, VALUES = "whole/", "channels/", "values/"


@dataclass(frozen=True)
class DeltaSize:
    """Bytes of a delta file and of all tensors of the model, which a full checkpoint holds."""

    delta_bytes: int
    full_bytes: int

    def __str__(self) -> str:
        share = self.delta_bytes / self.full_bytes
        return f"{self.delta_bytes:,} bytes, {share:.1%} of the {self.full_bytes:,} bytes of a full checkpoint"


def save_delta(path: str | os.PathLike[str], base: nn.Module | Mapping[str, Tensor], model: nn.Module) -> DeltaSize:
    """Write what differs between `base` and `model`; an interrupted write leaves the older file as it was.

    The head (of the plan, or what `model.get_classifier()` returns) is stored whole, so it may differ from the base's
    in size, and `apply_delta` does not care which random head the base has.

    Args:
        path: the file, by custom *.safetensors.
        base: the model before training, or its state_dict; on any device.
        model: the trained model, with or without its plan. Its plan's fingerprint goes into the file.

    Returns:
        the size of the file, beside that of a full checkpoint.

    Raises:
        ValueError: outside the head the two differ in more than values. Nothing is written then.
    """
    expect("model", model, nn.Module)
    before = base.state_dict() if isinstance(base, nn.Module) else base
    after = model.state_dict()
    plan = getattr(getattr(model, "trady", None), "plan", None)
    head = tuple(f"{name}." for name in (find_head(model, ()) if plan is None else plan.head))
    groups = _groups(model)
    content: dict[str, Tensor] = {}
    for name in {**after, **before}:
        if not name.startswith(head):
            _check_kind(f"base and {type(model).__name__}", name, before.get(name), after.get(name))
            content |= _difference(name, before[name], after[name], groups.get(name))
        elif name in after:
            content[WHOLE + name] = after[name].detach().cpu().clone(memory_format=torch.contiguous_format)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "plan": "" if plan is None else plan.fingerprint,
        "base": _fingerprint({name: before[name] for name in _borrowed(after, content)}),
        "content": _fingerprint(content),
    }
    with written_whole(path) as scratch:
        save_file(content, scratch, metadata)
    return DeltaSize(Path(path).stat().st_size, sum(tensor.nbytes for tensor in after.values()))


def apply_delta(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Turn the base model into the trained one, bit for bit, in place.

    Args:
        model: built as the trained one was, with the weights that training started from; its head may be random. It
            may have a plan.
        path: a file of `save_delta`.

    Returns:
        the same model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or something else, or belongs to another base. Nothing is changed then.
    """
    metadata, content = _read(path)
    state = model.state_dict()
    for key, tensor in content.items():
        kind, _, name = key.partition("/")
        if name not in state or kind == "whole":
            _check_kind(f"{path} and {type(model).__name__}", name, tensor, state.get(name))
    fingerprint = _fingerprint({name: state[name] for name in _borrowed(state, content)})
    if fingerprint != metadata["base"]:
        raise ValueError(
            f"{path}: made for the base {metadata['base']}, this model is {fingerprint}: build it with the weights "
            "that the fine-tuning started from"
        )
    names = sorted({key.partition("/")[2] for key in content})
    changed = {name: _changed(name, state[name], content) for name in names}
    with torch.no_grad():
        for name, tensor in changed.items():
            state[name].copy_(tensor)
    return model


def _difference(name: str, old: Tensor, new: Tensor, groups: int | None) -> dict[str, Tensor]:
    """What a file holds of one tensor: nothing, its changed channels, or the whole."""
    old, new = old.detach().cpu(), new.detach().cpu()
    if torch.equal(_bytes(old), _bytes(new)):
        return {}
    if groups is not None:
        rows, values = (_channel_major(tensor, groups) for tensor in (old, new))
        channels = (_bytes(rows) != _bytes(values)).flatten(1).any(1).nonzero().flatten()
        if len(channels) < len(values):
            return {CHANNELS + name: channels.int(), VALUES + name: values[channels].contiguous()}
    return {WHOLE + name: new.clone(memory_format=torch.contiguous_format)}


def _changed(name: str, base: Tensor, content: Mapping[str, Tensor]) -> Tensor:
    """The tensor of the trained model, on the CPU."""
    if (whole := content.get(WHOLE + name)) is not None:
        return whole
    channels, values = content[CHANNELS + name].long(), content[VALUES + name]
    groups = base.shape[0] // values.shape[1]
    rows = _channel_major(base.detach().cpu(), groups).index_copy(0, channels, values)
    return rearrange(rows, "(g c) o ... -> (g o) c ...", g=groups)


def _check_kind(where: str, name: str, one: Tensor | None, other: Tensor | None) -> None:
    """Raises ValueError where one of two tensors of a name is missing, or they differ in shape or dtype."""
    kinds = [
        "missing" if t is None else f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (one, other)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{where} do not fit: {name!r} is {kinds[0]} in the first and {kinds[1]} in the second")


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: wanted a file of format {FORMAT!r}, got {metadata.get('format')!r}")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path}: delta version {metadata.get('version')!r}, this library reads version {VERSION}")
    if metadata.get("content") != _fingerprint(content):
        raise ValueError(f"{path}: the delta is damaged, its values are not those that were saved")
    return metadata, content


def _borrowed(state: Iterable[str], content: Mapping[str, Any]) -> list[str]:
    """Names of the tensors of which the base gives all or a part."""
    return [name for name in state if WHOLE + name not in content]


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that differ where names, dtypes, shapes or values differ."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(_bytes(tensor).flatten().numpy().data)
    return digest.hexdigest()[:16]


def _groups(model: nn.Module) -> dict[str, int]:
    """State names of the weights that have input channels, and their groups."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))
    return {f"{name}.weight".lstrip("."): getattr(module, "groups", 1) for name, module in layers}


def _channel_major(weight: Tensor, groups: int) -> Tensor:
    """A weight [O, C/G, ...] by input channel, [C, O/G, ...]."""
    return rearrange(weight, "(g o) c ... -> (g c) o ...", g=groups)


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory, [*shape] -> uint8 [*shape, bytes]: equal where all bits are, those of NaN and -0 too."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)
