"""A batch in parts: the same gradient from one micro-batch after another, at the working memory of one.

Exact where samples do not see each other: with BatchNorm on its running statistics, as the default policy has it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from trady_triton.batch import Batch, call, check_loss, device_of, num_samples, split


def backward_in_parts(
    model: nn.Module,
    inputs: Batch,
    target: Batch,
    loss_fn: Callable[[Any, Any], Tensor],
    micro_batch: int | None = None,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Like `loss_fn(model(inputs), target).backward()`, with at most `micro_batch` samples at a time.

    `inputs` and `target` [N, ...], tensors or mappings of tensors, are split alike; the loss must be a mean over the
    samples. None splits nothing.
    With `autocast` forward and loss run under torch.autocast in that dtype.

    Returns:
        the loss of the whole batch, detached.

    Raises:
        ValueError: `micro_batch` is no positive integer, the batch is empty, the loss is no scalar, or inputs and
            target differ in samples where they are split.
    """
    size = num_samples(inputs)
    if size == 0:
        raise ValueError("the batch is empty")
    check_micro_batch(micro_batch)
    if micro_batch is not None and num_samples(target) != size:
        raise ValueError(f"target of {num_samples(target)} samples: wanted {size}, as many as inputs")
    both = inputs, target
    parts = [both] if micro_batch is None else zip(*(split(batch, micro_batch) for batch in both), strict=True)
    total: Tensor | None = None
    for x, y in parts:
        with casts(device_of(x), autocast):
            loss = loss_fn(call(model, x), y)
        check_loss(loss)
        part = num_samples(x)
        loss = loss if part == size else loss * (part / size)
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def casts(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[object]:
    """torch.autocast in that dtype; None casts nothing."""
    return torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None)


def check_micro_batch(micro_batch: int | None) -> None:
    """Raises ValueError unless it is None or a positive integer."""
    if micro_batch is not None and (isinstance(micro_batch, bool | float) or not micro_batch >= 1):
        raise ValueError(f"micro_batch {micro_batch!r}: wanted None or an integer of at least 1")
