"""What a device can do at best, measured: bytes moved a second, FLOPs a second in a matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Roofs:
    """Measured ceilings of a device."""

    gbytes_per_s: float
    tflops: float

    def floor(self, nbytes: int, flops: int) -> float:
        """Seconds below which nothing that moves these bytes and computes these FLOPs can get."""
        return max(nbytes / (1e9 * self.gbytes_per_s), flops / (1e12 * self.tflops))


def roofs(device: str, dtype: torch.dtype) -> Roofs:
    """Measure a large copy and a large square matrix product."""
    on_cuda = torch.device(device).type == "cuda"
    source = torch.randn((1 << 28) if on_cuda else (1 << 24), device=device)
    target, size = torch.empty_like(source), 8192 if on_cuda else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    moved = 2 * source.numel() * source.itemsize
    return Roofs(
        moved / _best(lambda: target.copy_(source), device) / 1e9,
        2 * size**3 / _best(lambda: left @ right, device) / 1e12,
    )


def _best(call: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Seconds of the fastest of a few calls."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    seconds = []
    for _ in range(repeats + 2):
        wait()
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])
