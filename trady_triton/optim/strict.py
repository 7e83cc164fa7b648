"""StepMemory: what training steps really take, held against the memory that their plan promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trady_triton.meters import Peak, peak_memory, storage_bytes
from trady_triton.plan import Plan


class StepMemory:
    """The peak since the last update, compared with the plan's `memory` before the next one.

    Counts the tensors of `owned()` (the model, gradients, optimizer state, ids of channels) and what is made beyond
    them. What else lived before, such as the batch, is not seen: a step that is let pass may exceed the plan by that;
    one that is refused does exceed it.

    On CUDA all that runs counts, as the allocator says. No allocator keeps count on the CPU: there storages are counted
    inside `metered` blocks.
    """

    def __init__(self, plan: Plan, device: torch.device, owned: Callable[[], Iterable[Tensor]]) -> None:
        """Raises ValueError if the plan promises no memory."""
        if plan.memory is None:
            raise ValueError("strict: the plan promises no memory; wanted one of make_plan(..., memory=...)")
        self._limit, self._micro_batch = plan.memory, plan.micro_batch
        self._device, self._owned = device, owned
        self._highest: int | None = None
        self._running: tuple[Peak, int] | None = None

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Count what runs inside: forward, loss and backward, of the whole batch or of one part after another."""
        if self._running is not None:  # on CUDA all is counted, and an inner block is a part of the outer one
            yield
            return
        with peak_memory(self._device) as peak:
            self._running = peak, storage_bytes(self._owned())
            try:
                yield
            finally:
                self._note()
                self._running = None

    def check(self) -> None:
        """Begin a new count.

        Raises:
            RuntimeError: what was counted is more than was promised, or nothing was counted.
        """
        self._note()
        highest = self._highest
        self.restart()
        if highest is None:
            raise RuntimeError(
                "strict: nothing was counted in this step; on the CPU run its forward and backward inside "
                "`with optimizer.metered():`"
            )
        if highest > self._limit:
            parts = f"{self._micro_batch} samples at a time (backward_in_parts), " if self._micro_batch else ""
            raise RuntimeError(
                f"strict: this step took {highest} bytes ({highest / 2**20:.2f} MiB), {highest - self._limit} more "
                f"than the {self._limit} that the plan promises; nothing was updated. Train as planned: {parts}the "
                "input shape, loss and autocast that were given to make_plan; or make a plan for more memory"
            )

    def restart(self) -> None:
        """Count anew from here on."""
        self._highest = self._running = None
        if self._device.type == "cuda":
            with peak_memory(self._device) as peak:
                self._running = peak, storage_bytes(self._owned())

    def _note(self) -> None:
        if self._running is not None:
            peak, existing = self._running
            self._highest = max(self._highest or 0, existing + peak.peak_bytes)
