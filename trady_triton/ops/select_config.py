"""Tile sizes, warps, stages and splits for every kernel, in plain Python: the same answer on every run and machine.

    @rule("conv_wgrad")                                     # in the op's own file; one rule a kernel
    def _rule(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config: ...

    config = select_config("conv_wgrad", {"T": T, "O": O, "K": K}, x.dtype, Arch.of(x.device))
    launch(kernel, grid, ..., config=config)

A tuned table (JSON: key of `table_key` -> fields of Config) may override a rule and may name backend "mm", which
asks for cuBLAS on the compact store.   `shape` maps the op's shape letters to sizes.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

Shape = Mapping[str, int]

MAX_ACCUMULATORS_PER_THREAD = 128
MAX_WORKSPACE_BYTES = 8 << 20
MAX_PROGRAMS = 2**31 - 1
LAUNCH_BYTES = 8 << 20  # what an H100 moves through its L2 cache in the 1.5 us that another kernel takes to start
NUM_SMS = {"A100": 108, "H100": 132, "H200": 132, "H800": 132, "B200": 148, "A10": 72, "L4": 58, "MI300X": 304}


@dataclass(frozen=True)
class Config:
    """What a launch needs beside its arguments; `backend` is "triton" or "mm" (cuBLAS on the compact store)."""

    meta: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 4
    split: int = 1
    backend: str = "triton"


@dataclass(frozen=True)
class Arch:
    """What the rules may know of a device: `name` is sm_80, sm_90, sm_100, ..., gfx942 or cpu."""

    name: str
    num_sms: int = 132

    @property
    def hip(self) -> bool:
        """Whether the device is an AMD one."""
        return self.name.startswith("gfx")

    @staticmethod
    def of(device: torch.device) -> Arch:
        """The architecture of a device; the CPU (interpreter) counts as an H100 so that it runs the same tiles."""
        return _cuda_arch(device.index or 0) if device.type == "cuda" else Arch("cpu")


@functools.cache
def _cuda_arch(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    named = (NUM_SMS[word] for word in re.split(r"\W", properties.name) if word in NUM_SMS)
    return Arch(name, next(named, properties.multi_processor_count))


Rule = Callable[[Shape, torch.dtype, Arch], Config]
RULES: dict[str, Rule] = {}
ROUNDED = ("C", "K", "M", "N", "O", "ROWS", "T")  # sizes of batch, draw and layer; the rest is geometry
TABLE_FILE = Path(__file__).with_name("tuned.json")


def rule(kernel: str) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule for `kernel`."""

    def register(function: Rule) -> Rule:
        RULES[kernel] = function
        return function

    return register


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is >= n."""
    return 1 << max(n - 1, 0).bit_length()


def split_count(programs: int, steps: int, step_bytes: int, partial_bytes: int, slots: int) -> int:
    """How many parts to cut a sum of `steps` into, when `programs` take one whole each and `slots` run at a time.

    The parts that move the fewest bytes through the L2 cache, where slots that idle count as if they read, and a second
    launch as much as it takes time. A step reads step_bytes; a part writes partial_bytes, read again by the second pass
    before they leave the cache. At least 4 steps a part, and all parts within the workspace.
    """

    def moved(split: int) -> int:
        rounds = -(-programs * split // slots)
        read = rounds * -(-steps // split) * step_bytes * slots
        return read + (split > 1) * (2 * split * partial_bytes + LAUNCH_BYTES)

    most = min(steps // 4, MAX_WORKSPACE_BYTES // partial_bytes, -(-2 * slots // programs))
    return min(range(1, max(most, 1) + 1), key=moved)


def entry_shape(shape: Shape) -> Shape:
    """The largest sizes that share a tuned entry: a new K seldom is a new one, but tiles are cut for a geometry."""
    return {name: next_power_of_2(size) if name in ROUNDED else size for name, size in shape.items()}


def table_key(kernel: str, shape: Shape, dtype: torch.dtype, arch: Arch) -> str:
    """The key of the tuned table."""
    sizes = ",".join(f"{name}={size}" for name, size in sorted(entry_shape(shape).items()))
    return f"{kernel}|{sizes}|{str(dtype).removeprefix('torch.')}|{arch.name}"


@functools.cache
def _tuned_table() -> dict[str, Config]:
    if not TABLE_FILE.exists():
        return {}
    return {key: Config(**entry) for key, entry in json.loads(TABLE_FILE.read_text()).items()}


@functools.lru_cache(maxsize=4096)
def _select(kernel: str, sizes: tuple[tuple[str, int], ...], dtype: torch.dtype, arch: Arch) -> Config:
    shape = dict(sizes)
    tuned = _tuned_table()
    if tuned and (entry := tuned.get(table_key(kernel, shape, dtype, arch))):
        return entry
    if kernel not in RULES:
        raise KeyError(f"kernel {kernel!r} has no rule; there are {', '.join(sorted(RULES))}")
    return RULES[kernel](shape, dtype, arch)


def select_config(kernel: str, shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    """The tuned entry for this shape if there is one, else what the kernel's rule says.

    Raises: KeyError for a kernel without a rule.
    """
    return _select(kernel, tuple(shape.items()), dtype, arch)
