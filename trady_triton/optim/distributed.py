"""Compact gradients between processes: averaged over ranks as one buffer, by processes that run the same draw.

DistributedDataParallel and `fully_shard` reduce the gradients of the model's own parameters; compact gradients belong
to no parameter. They are reduced when a step needs them, which is exact after any number of accumulated backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import JoinHook

from trady_triton.slot import ChannelSlot

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Processes:
    """The processes that train together: those of a group, by default all where torch.distributed is initialised."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self._averaged = self._is_queued = False
        self._agreed: str | None = None

    @property
    def exist(self) -> bool:
        """Whether somebody has made a process group, of one process maybe."""
        return dist.is_available() and dist.is_initialized()

    @property
    def count(self) -> int:
        """How many; 1 where nobody has made a process group."""
        return dist.get_world_size(self.group) if self.exist else 1

    def average(self, slots: Sequence[ChannelSlot], draw: str, name: str) -> None:
        """Average the compact gradients over the processes. All must have the draw of that hexadecimal digest.

        Raises:
            RuntimeError: they have not, which is looked at once a draw; `name` describes it.
        """
        drawn = [slot for slot in slots if slot.channels.numel()]
        if self._agreed != draw:
            check_agreement(draw, name, slots[0].proxy.device, self.group)
            self._agreed = draw
        average_gradients_([slot.proxy for slot in drawn], self.group)
        for slot in drawn:
            slot.draw.averaged = True
        self._averaged = True

    def after_backward(self, leaf: Tensor, action: WeakMethod[Callable[[], None]]) -> None:
        """Act at the end of every backward that reaches the leaf, once for all leaves."""

        def queue(_: Tensor) -> None:
            if not self._is_queued:
                self._is_queued = True
                torch.autograd.Variable._execution_engine.queue_callback(act)

        def act() -> None:
            self._is_queued = False
            if (method := action()) is not None:
                method()

        leaf.register_post_accumulate_grad_hook(queue)  # type: ignore[no-untyped-call]

    def copy_from_last(self, tensors: Iterable[Tensor], device: torch.device, is_last: bool) -> None:
        """Give all processes the tensors of one that had batches to the end."""
        rank = torch.tensor(dist.get_rank(self.group) if is_last else -1, device=device)
        dist.all_reduce(rank, op=dist.ReduceOp.MAX, group=self.group)
        for tensor in tensors:
            value = tensor.to(device, copy=True)
            dist.broadcast(value, group=self.group, group_src=int(rank))
            tensor.copy_(value)

    def forget(self) -> None:
        """What was averaged is used up; a backward that failed has left nothing to wait for."""
        self._averaged = self._is_queued = False

    def must_average(self, slots: Sequence[ChannelSlot], used: bool) -> bool:
        """Whether a step of several processes still has to average; the same in all of them.

        `used` tells that somebody has clipped, unscaled or searched the gradients of this process.

        Raises:
            RuntimeError: they were used as if they were the averages, or a backward ran after these were made.
        """
        if self._averaged and any(slot.is_pending and not slot.draw.averaged for slot in slots):
            raise RuntimeError("a backward ran after synchronize(): call it again, in every process, before step()")
        if not self._averaged and used:
            raise RuntimeError(
                "compact gradients were clipped, unscaled or searched for infinities before they were averaged over "
                "the processes: call optimizer.synchronize() after the last backward, before clip_grad_norm_ and "
                "before a GradScaler's unscale_ and step"
            )
        return not self._averaged


class StepsWithoutBatch(JoinHook):
    """What a process does that has no more batches: `step` for each step of the others, and at the end `finish`."""

    def __init__(self, step: Callable[[], None], finish: Callable[[bool], None]) -> None:
        self.main_hook = step  # type: ignore[method-assign]
        self.post_hook = finish  # type: ignore[assignment, method-assign]


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
            part = flat.view(proxy.shape).data  # with a version of its own: a backward into one part changes no other
            part.zero_() if proxy.grad is None else part.copy_(proxy.grad)
            proxy.grad = part
        buffer.div_(dist.get_world_size(group))  # before the sum, as DistributedDataParallel does: it overflows less
        dist.all_reduce(buffer, group=group)


def check_agreement(digest: str, name: str, device: torch.device, group: ProcessGroup | None) -> None:
    """Raises RuntimeError on every process unless all have a draw of this digest."""
    number = int(digest[:12], 16)
    own = torch.tensor([number, -number], dtype=torch.int64, device=device)
    most = own.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    if not torch.equal(own, most):
        raise RuntimeError(
            f"the processes do not train the same channels: this one has {name}; load the same plan in all, and call "
            "resample with the same epoch and scores"
        )
