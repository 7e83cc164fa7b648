"""Ops on real layers under pytest-benchmark: our kernels, their torch twins, and what plain training does instead.

    pytest bench/bench_ops.py --benchmark-enable --benchmark-compare=FILE

Inputs are rotated so that none is found in a cache, and results are checked before anything is timed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from trady_triton.bench.layers import Layer, Work, layers, work
from trady_triton.bench.movers import MOVERS
from trady_triton.bench.roofs import Roofs, roofs

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
BATCH = int(os.environ.get("BENCH_OPS_BATCH", "128" if CUDA else "8"))
WAYS = ("triton", "twin", "dense") if CUDA else ("twin", "dense")  # kernels need a GPU
COLD = 128 << 20 if CUDA else 0  # bytes of inputs that push each other out of the cache
CALLS = 10 if CUDA else 1  # a round, so that the wait for the device weighs little


@pytest.fixture(scope="module")
def device_roofs() -> Roofs:
    return roofs(DEVICE, DTYPE)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda way: monkeypatch.setenv("TRADY_TRITON_BACKEND", "triton" if way == "triton" else "torch")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", layers(), ids=lambda layer: layer.name)
def test_wgrad(benchmark, layer: Layer, way: str, device_roofs: Roofs, backend: Callable[[str], None]) -> None:
    backend(way)
    measure(benchmark, f"dW of {layer.name}", list(copies(work, layer)), way, device_roofs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", layers()[2::4], ids=lambda layer: layer.name)
@pytest.mark.parametrize("op", MOVERS)
def test_mover(benchmark, op: str, layer: Layer, way: str, device_roofs: Roofs, backend: Callable[[str], None]) -> None:
    backend(way)
    measure(benchmark, f"{op} of {layer.name}", list(copies(MOVERS[op], layer)), way, device_roofs)


def measure(benchmark, name: str, inputs: list[Work], way: str, device_roofs: Roofs) -> None:
    """Check, then time calls on the inputs in turn."""
    check(inputs[0], name, DTYPE)
    first, turn = inputs[0], itertools.cycle(inputs)
    nbytes = first.dense_bytes if way == "dense" else first.sparse_bytes
    flops = first.dense_flops if way == "dense" else first.sparse_flops
    benchmark.group = name
    benchmark.extra_info.update(layer=name, way=way, calls=CALLS, bytes=nbytes, flops=flops, batch=BATCH,
                                dtype=str(DTYPE), floor_s=device_roofs.floor(nbytes, flops),
                                gbytes_per_s=device_roofs.gbytes_per_s, tflops=device_roofs.tflops)  # fmt: skip

    def run() -> None:
        for one in itertools.islice(turn, CALLS):
            (one.dense if way == "dense" else one.sparse)()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20 if CUDA else 5, warmup_rounds=3 if CUDA else 1)


def check(one: Work, name: str, dtype: torch.dtype) -> None:
    """A wrong result has no speed."""
    error = one.error()
    assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4), f"{name}: errs by {error:.2g}"


def copies(make: Callable[..., Work], layer: Layer) -> Iterator[Work]:
    """The work on inputs enough to fill a cache."""
    first = make(layer, BATCH, DEVICE, DTYPE)
    yield first
    for seed in range(1, min(16, COLD // first.sparse_bytes + 1)):
        yield make(layer, BATCH, DEVICE, DTYPE, seed)
