"""What one training step takes: bytes kept for the backward, peak memory, FLOPs by kind; and the floor of all peaks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from trady_triton import TraDyOptimizer
from trady_triton.app.train import start_epoch, train_mode, train_step
from trady_triton.meters import FlopsByKind, KeptBytes, peak_memory
from trady_triton.slot import find_slot

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepCost:
    """Bytes and FLOPs of one training step, all measured.

    `kept_bytes` are kept between forward and backward, `peak_bytes` is the most memory beyond weights and batch, and
    `channel_bytes` are the compact store and the compact gradients, which a byte budget limits: their largest sum
    over several epochs' draws.
    """

    kept_bytes: int
    kept_by_kind: dict[str, int]
    peak_bytes: int
    forward_flops: int
    dgrad_flops: int
    wgrad_flops: int
    channel_bytes: int


def measure_step(
    model: nn.Module, optimizer: Optimizer, batch: Batch, *, epochs: int, max_grad_norm: float | None = None
) -> StepCost:
    """Measure a step on a batch; where channels are drawn, of the epoch that keeps most. Changes the weights."""
    inputs, target = batch
    train_mode(model)
    channel_bytes = 0
    if isinstance(optimizer, TraDyOptimizer):
        kept_in, channels_in = zip(
            *(_epoch_bytes(model, optimizer, epoch, batch) for epoch in range(epochs)), strict=True
        )
        start_epoch(optimizer, kept_in.index(max(kept_in)))
        channel_bytes = max(channels_in)
    optimizer.zero_grad()
    with KeptBytes(model) as kept:
        loss = cross_entropy(model(inputs), target)
    del loss
    with peak_memory(inputs.device) as memory:
        train_step(model, optimizer, inputs, target, cross_entropy, max_grad_norm)
    with FlopsByKind(model) as flops:
        train_step(model, optimizer, inputs, target, cross_entropy, max_grad_norm)
    return StepCost(
        kept_bytes=kept.total,
        kept_by_kind=kept.by_kind,
        peak_bytes=memory.peak_bytes,
        forward_flops=flops.forward_flops,
        dgrad_flops=flops.dgrad_flops,
        wgrad_flops=flops.wgrad_flops,
        channel_bytes=channel_bytes,
    )


def inference_peak(model: nn.Module, inputs: Tensor) -> int:
    """Peak bytes of a forward without gradients, beyond weights and inputs: no training step can take less."""
    model.eval()
    with torch.no_grad(), peak_memory(inputs.device) as memory:
        model(inputs)
    return memory.peak_bytes


def _epoch_bytes(model: nn.Module, optimizer: TraDyOptimizer, epoch: int, batch: Batch) -> tuple[int, int]:
    """Bytes kept for the backward with the channels of an epoch, and bytes of its compact store and gradients."""
    optimizer.resample(epoch)
    with KeptBytes(model) as kept:
        loss = cross_entropy(model(batch[0]), batch[1])
    loss.backward()  # type: ignore[no-untyped-call]
    slots = [slot for parameter in model.parameters() if (slot := find_slot(parameter)) is not None]
    gradients = [slot.proxy.grad.untyped_storage().nbytes() for slot in slots if slot.proxy.grad is not None]
    optimizer.zero_grad()
    return kept.total, kept.by_kind.get("trained channels", 0) + sum(gradients)
