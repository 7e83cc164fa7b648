"""Compact gradients between processes: averaged over ranks as one buffer, by processes that run the same draw.

DistributedDataParallel and `fully_shard` reduce the gradients of the model's own parameters; compact gradients belong
to no parameter. They are reduced when a step needs them, which is exact after any number of accumulated backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def world_size(group: ProcessGroup | None) -> int:
    """Processes of a group; of the default group for None, 1 where nobody has made one."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def average_gradients_(proxies: Sequence[Tensor], group: ProcessGroup | None) -> None:
    """Replace the gradients by their means over all processes, with one all-reduce for each device and dtype.

    A proxy without a gradient counts as zeros, as where a process had no batch. The gradients become views of the
    buffer that was reduced.
    """
    order = sorted(proxies, key=lambda proxy: (str(proxy.device), str(proxy.dtype)))
    for (device, dtype), alike in groupby(order, key=lambda proxy: (proxy.device, proxy.dtype)):
        members = list(alike)
        buffer = torch.empty(sum(proxy.numel() for proxy in members), device=device, dtype=dtype)
        for proxy, flat in zip(members, torch.split(buffer, [proxy.numel() for proxy in members]), strict=True):
            part = flat.view(proxy.shape)
            part.zero_() if proxy.grad is None else part.copy_(proxy.grad)
            proxy.grad = part
        buffer.div_(world_size(group))  # before the sum, as DistributedDataParallel does: half as likely to overflow
        dist.all_reduce(buffer, group=group)


def check_agreement(fingerprint: str, epoch: int, device: torch.device, group: ProcessGroup | None) -> None:
    """Raises RuntimeError on every process unless all run the plan of that fingerprint and the draw of that epoch."""
    numbers = int(fingerprint[:12], 16), epoch
    own = torch.tensor([sign * number for number in numbers for sign in (1, -1)], dtype=torch.int64, device=device)
    most = own.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    if not torch.equal(own, most):
        raise RuntimeError(
            f"the processes do not train the same channels: this one has epoch {epoch} of plan {fingerprint}; load the "
            "same plan in all, and call resample with the same epoch"
        )
