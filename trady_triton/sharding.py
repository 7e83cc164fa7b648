"""The rows of a weight that this process owns: all of them, or its shard after `fully_shard`.

FSDP2 shards weights along output channels, channels are drawn along input channels: so of every drawn channel each
process owns some rows, and an update needs no communication beyond the gradient's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Index = tuple[Tensor, Tensor]


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a DTensor."""
    return hasattr(weight, "placements")


def whole(weight: Tensor) -> Tensor:
    """All rows of a weight; of a sharded one collected from all processes."""
    return weight.full_tensor() if is_sharded(weight) else weight  # type: ignore[attr-defined]


def local_rows(weight: Any) -> tuple[Tensor, int]:
    """This process's rows of a sharded weight [O, ...], a view, and the number of its first row.

    Raises:
        ValueError: the weight is sharded along another dimension than its outputs.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not all(placement.is_replicate() or placement.is_shard(0) for placement in weight.placements):
        raise ValueError(f"a weight placed as {weight.placements}: wanted shards along dimension 0, as of fully_shard")
    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return weight.to_local(), offset[0]


def drawn_rows(weight: Tensor, channels: Tensor, groups: int) -> tuple[Tensor, Index, Index]:
    """The local rows of a sharded weight [O, C/G, ...], and where drawn channels lie in them and in compact tensors.

    The indices pair elements of local[row, column] with those of compact[k, o], [K, O/G, ...].
    """
    local, first = local_rows(weight)
    per_group, group_size = weight.shape[0] // groups, weight.shape[1]
    outputs = torch.arange(per_group, device=channels.device)
    rows = (channels // group_size * per_group)[:, None] + outputs - first
    k, o = ((rows >= 0) & (rows < local.shape[0])).nonzero(as_tuple=True)
    return local, (rows[k, o], channels[k] % group_size), (k, o)
