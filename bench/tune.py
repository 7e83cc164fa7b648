"""Times the configs of every weight-gradient kernel on this GPU, and the library beside them: writes the tuned table.

    python -m trady_triton.bench.tune --out trady_triton/ops/tuned.json

An entry is written, as soon as its layer is done, where something beats what the rule says by `MARGIN`; backend "mm"
where cuBLAS or cuDNN on the compact data does. Every candidate's result is compared with the library's before it may
win. `--dry-run` tries one tiny layer of each kind once, without times that mean anything, in triton's interpreter.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from trady_triton.ops import conv_wgrad, grouped_wgrad, select_config, token_wgrad
from trady_triton.ops.select_config import (
    MAX_ACCUMULATORS_PER_THREAD,
    MAX_WORKSPACE_BYTES,
    RULES,
    TABLE_FILE,
    Config,
    Shape,
    entry_shape,
    table_key,
)

MARGIN = 0.97
FORCES = "TRADY_TRITON_BACKEND"
RESULT_SIZES = ("K", "M", "O", "R", "ROWS", "S", "TAPS")  # those of a shape whose product is the size of the result


@dataclass(frozen=True)
class Layer:
    """One layer with K drawn channels: N images of P x Q output pixels (tokens: P = 1, images = sequences)."""

    kernel: str
    N: int
    P: int
    Q: int
    O: int  # noqa: E741
    K: int
    taps: int = 1
    dtype: torch.dtype = torch.bfloat16

    def call(self, device: str) -> Callable[[], Tensor]:
        """The weight gradient of noise, ready to run."""
        generator = torch.Generator(device).manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        side, pad = (self.taps, self.taps), (self.taps // 2, self.taps // 2)
        geometry = side, (1, 1), pad, (1, 1)
        if self.kernel == "token_wgrad":
            store, dy = noise(self.K, self.N * self.P * self.Q), noise(self.N, self.P * self.Q, self.O)
            return lambda: token_wgrad(store, dy)
        planes, dy = noise(self.K, self.N, self.P, self.Q), noise(self.N, self.O, self.P, self.Q)
        if self.kernel == "conv_wgrad":
            return lambda: conv_wgrad(planes, dy, *geometry)
        channels = torch.arange(self.K, device=device)
        width = 1 if self.kernel == "depthwise_wgrad" else 32
        return lambda: grouped_wgrad(planes, dy, channels, (width, width), *geometry)


LAYERS = (
    *(Layer("token_wgrad", 128, 1, 197, o, K) for o, K in ((2304, 48), (3072, 48), (768, 192), (768, 48), (768, 768))),
    *(Layer("token_wgrad", 128, 56, 56, o, K) for o, K in ((576, 16), (384, 8), (96, 24))),
    *(Layer("conv_wgrad", 128, s, s, o, o // 16, 3) for s, o in ((56, 64), (28, 128), (14, 256), (7, 512))),
    *(Layer("conv_wgrad", 128, s, s, o, o // 2, 3) for s, o in ((28, 128), (14, 256), (7, 512))),
    *(Layer("depthwise_wgrad", 128, s, s, o, o // 16, t) for s, o, t in ((56, 96, 7), (28, 192, 7), (14, 576, 3))),
    *(Layer("grouped_wgrad", 128, s, s, o, o // 16, 3) for s, o in ((28, 256), (14, 512))),
)
TINY = (
    Layer("token_wgrad", 2, 1, 40, 32, 16, dtype=torch.float32),
    Layer("conv_wgrad", 1, 6, 6, 16, 8, 3, torch.float32),
    Layer("depthwise_wgrad", 1, 6, 6, 8, 4, 3, torch.float32),
)


@contextmanager
def forced(kernel: str, choose: Callable[..., Config]) -> Iterator[None]:
    """Let `choose(shape, dtype, arch)` be the rule of a kernel, whatever the table says."""
    rule, table = RULES[kernel], select_config._tuned_table
    RULES[kernel], select_config._tuned_table = choose, dict  # type: ignore[assignment]
    select_config._select.cache_clear()
    try:
        yield
    finally:
        RULES[kernel], select_config._tuned_table = rule, table
        select_config._select.cache_clear()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """TRADY_TRITON_BACKEND inside the block."""
    before = os.environ.get(FORCES)
    os.environ[FORCES] = name
    try:
        yield
    finally:
        os.environ.pop(FORCES)
        if before is not None:
            os.environ[FORCES] = before


def rule_of(layer: Layer, run: Callable[[], Tensor]) -> tuple[str, Shape, Config]:
    """(key in the table, the sizes that the rule is asked for, what it says) for a layer."""
    seen: list[tuple[str, Shape, Config]] = []
    rule = RULES[layer.kernel]

    def spy(shape: Shape, dtype: torch.dtype, arch: Any) -> Config:
        seen.append((table_key(layer.kernel, shape, dtype, arch), shape, rule(shape, dtype, arch)))
        return seen[-1][2]

    with forced(layer.kernel, spy), backend("triton"):
        run()
    return seen[0]


def candidates(base: Config) -> list[Config]:
    """The rule's config and its neighbours, within the limits that all configs keep; more splits are never tried."""
    found = [base]
    for name in ("BN", "BK"):
        if name in base.meta:
            sizes = (base.meta[name] // 2, base.meta[name] * 2)
            found += [replace(base, meta={**base.meta, name: size}) for size in sizes if size >= 16]
    found += [replace(base, split=split) for split in {1, base.split // 2} - {0, base.split}]
    found += [replace(base, num_warps=warps) for warps in {4, 8} - {base.num_warps}]
    return [replace(config, backend="triton") for config in found if _fits(config)]


def _fits(config: Config) -> bool:
    tile = config.meta.get("BM", 1) * config.meta.get("BN", 1)
    return tile <= MAX_ACCUMULATORS_PER_THREAD * 32 * config.num_warps


def serves_entry(config: Config, shape: Shape) -> bool:
    """Whether the workspace has room for the parts of every shape that shares the entry of this one."""
    result = math.prod(size for name, size in entry_shape(shape).items() if name in RESULT_SIZES)
    return config.backend == "mm" or config.split == 1 or 4 * config.split * result <= MAX_WORKSPACE_BYTES


def milliseconds(run: Callable[[], Tensor], device: str) -> float:
    """Median time of a call with a cold cache; on the CPU that of one call."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, return_mode="median"))
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def tune(layer: Layer, device: str, console: Console) -> tuple[str, Config, bool]:
    """(key, the fastest that may be written, whether it beats the rule) for a layer."""
    run = layer.call(device)
    key, shape, ruled = rule_of(layer, run)
    if ruled.backend == "taps":
        console.print(f"{key}: left to the kernel of grouped convolutions")
        return key, ruled, False
    with backend("torch"):
        expected = run()
        times = [(milliseconds(run, device), replace(ruled, backend="mm"))]
    times += _timed(layer, run, candidates(ruled), expected, device, console)
    by_rule = min((spent for spent, config in times if config == ruled), default=float("inf"))
    spent, best = min((pair for pair in times if serves_entry(pair[1], shape)), key=lambda pair: pair[0])
    console.print(f"{key}: rule {by_rule:.4f} ms, library {times[0][0]:.4f} ms, best {spent:.4f} ms {best}")
    return key, best, spent < MARGIN * by_rule


def _timed(
    layer: Layer, run: Callable[[], Tensor], configs: list[Config], expected: Tensor, device: str, console: Console
) -> Iterator[tuple[float, Config]]:
    """Each config with its milliseconds, but those that do not compile or need more than the device has."""
    from triton.errors import TritonError

    for config in configs:
        with forced(layer.kernel, lambda *_, config=config: config), backend("triton"):
            try:
                _check(layer, config, run(), expected)
                yield milliseconds(run, device), config
            except (TritonError, RuntimeError) as error:
                if device == "cuda":
                    torch.cuda.synchronize()  # raises again where the device itself failed
                console.print(f"{layer}: {config} left out: {error}")


def _check(layer: Layer, config: Config, result: Tensor, expected: Tensor) -> None:
    error = float((result - expected).abs().max() / expected.abs().max())
    if not error <= 1e-2:
        raise ValueError(f"{layer}: {config} errs by {error:.2g} of the largest gradient; it was not written")


def main(
    out: Annotated[Path, typer.Option(help="The table.")] = TABLE_FILE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="One tiny layer of each kind, on the CPU.")] = False,
) -> None:
    """Tune, and write what won; entries of other devices stay."""
    device = "cpu" if dry_run else "cuda"
    if not dry_run and not torch.cuda.is_available():
        raise SystemExit("tuning needs a GPU; --dry-run tries the kernels in triton's interpreter")
    console = Console(width=200)
    table, count = json.loads(out.read_text()) if out.exists() else {}, 0
    for layer in TINY if dry_run else LAYERS:
        key, config, wins = tune(layer, device, console)
        if wins or dry_run:
            table[key], count = asdict(config), count + 1
            out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    console.print(f"{out}: {count} entries written")


if __name__ == "__main__":
    typer.run(main)
