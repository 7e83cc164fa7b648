"""Batches: a tensor [N, ...], or a mapping of such tensors that the model takes by name, as Transformers' models do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Tensor]
Shape = Sequence[int] | Mapping[str, Tensor]


def call(model: nn.Module, inputs: Batch) -> Any:
    """The forward."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def pair(batch: Any) -> tuple[Any, Any]:
    """Input and target of a batch as loaders give it: two in a tuple or list; a mapping is both at once.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(batch, Mapping):
        return batch, batch
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
    raise ValueError(f"a batch is a {type(batch).__name__}{size}: wanted an iterable of (input, target) pairs, or of "
                     "mappings")  # fmt: skip


def check_loss(loss: Any) -> None:
    """Raises ValueError unless the loss is one number with a gradient."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"loss_fn returned {found}: wanted a scalar tensor, such as a mean over the samples")
    if not loss.requires_grad:
        raise ValueError("loss_fn returned a tensor without gradient: it does not depend on what is trained, or was "
                         "detached")  # fmt: skip


def tensors(batch: Batch) -> list[Tensor]:
    """The tensors of a batch.

    Raises:
        TypeError: it is no tensor and no mapping of tensors.
    """
    found = list(batch.values()) if isinstance(batch, Mapping) else [batch]
    wrong = [type(value).__name__ for value in found if not isinstance(value, Tensor) or value.dim() == 0]
    if wrong or not found:
        raise TypeError(f"batch of type {(wrong or ['empty mapping'])[0]}: wanted a tensor or a mapping of tensors")
    return found


def num_samples(batch: Batch) -> int:
    """N, of the first tensor."""
    return tensors(batch)[0].shape[0]


def device_of(batch: Batch) -> torch.device:
    """Where the first tensor is."""
    return tensors(batch)[0].device


def split(batch: Batch, size: int) -> Sequence[Batch]:
    """Parts of `size` samples, the last one maybe smaller."""
    if not isinstance(batch, Mapping):
        return torch.split(batch, size)
    columns = {name: torch.split(tensor, size) for name, tensor in batch.items()}
    return [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]


def samples_in(shape: Shape) -> int:
    """N."""
    return num_samples(shape) if isinstance(shape, Mapping) else shape[0]


def first_of(shape: Shape, size: int | None) -> Shape:
    """The shape of the first samples, at most `size`; of all without."""
    if isinstance(shape, Mapping):
        return {name: tensor[:size] for name, tensor in shape.items()}
    return (shape[0] if size is None else min(size, shape[0]), *shape[1:])


def made_to(shape: Shape, like: Tensor) -> Batch:
    """A batch of that shape without content, on the device of `like`, and of its dtype unless the shape has dtypes."""
    if isinstance(shape, Mapping):
        return emptied(shape, like.device)
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)


def emptied(batch: Batch, device: torch.device) -> Batch:
    """A batch of the same shapes and dtypes without content."""
    if isinstance(batch, Mapping):
        return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for name, tensor in batch.items()}
    return torch.empty(batch.shape, dtype=batch.dtype, device=device)
