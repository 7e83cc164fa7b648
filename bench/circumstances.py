"""Where numbers come from: device, versions, commit, date. Without these they mean nothing."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import trady_triton
import trady_triton.bench
import trady_triton.models

PACKAGES = ("torch", "triton", "timm", "trady-triton", "peft", "badam", "galore-torch", "apollo-torch", "torchao",
            "bitsandbytes")  # fmt: skip
_OUTPUT = ("report", "tables", "plots", "readme")  # files of bench/ that only show results


def circumstances(device: str) -> dict[str, Any]:
    """Device, threads, versions, commit and date, as JSON."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 1),
    }


def device_name(device: str) -> str:
    """The card, or the processor."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def slug(device: str) -> str:
    """The device as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower().replace("(r)", "")).strip("-")


@cache
def versions() -> dict[str, str | None]:
    """Python, and each package that takes part; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


@cache
def commit() -> str | None:
    """The commit of the repository, "+" added where files differ from it; None outside of one."""
    folder = Path(trady_triton.__file__).parent.parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return None if head.returncode else head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


@cache
def code_hash() -> str:
    """12 hexadecimal digits that differ where the code that is measured, or that measures, differs."""
    digest = hashlib.sha256()
    for package in (trady_triton, trady_triton.models, trady_triton.bench):
        folder = Path(next(iter(package.__path__)))
        for file in sorted(folder.rglob("*.py")):
            is_output = package is trady_triton.bench and file.stem in _OUTPUT
            if not is_output and "app" not in file.relative_to(folder).parts:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
