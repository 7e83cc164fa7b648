"""What a benchmark runs: settings.json by mode, and where results go."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from trady_triton.bench.circumstances import slug
from trady_triton.bench.nets import Net

MODES = ("cpu", "quick", "cuda")
RESULTS = Path("bench/results")


def settings(mode: str) -> dict[str, Any]:
    """Nets, budgets and repeats of a mode."""
    content: dict[str, Any] = json.loads((files("trady_triton.bench") / "settings.json").read_text())
    if mode not in content:
        raise ValueError(f"mode {mode!r}: wanted one of {', '.join(content)}")
    return content[mode]


def nets_of(mode: str, names: list[str] | None = None) -> list[Net]:
    """The nets of a mode, or those of them that are named."""
    content = settings(mode)
    chosen = content["nets"] if names is None else {name: content["nets"][name] for name in names}
    autocast = getattr(torch, content["autocast"]) if "autocast" in content else None
    return [
        Net(name, sizes["batch"], sizes["image_size"], device_of(mode), autocast, content.get("channels_last", False))
        for name, sizes in chosen.items()
    ]


def device_of(mode: str) -> str:
    """cpu or cuda."""
    return "cuda" if mode == "cuda" else "cpu"


def results_folder(mode: str, out: Path = RESULTS) -> Path:
    """Where a mode's results go: a folder a device, quick ones apart."""
    return out / (slug(device_of(mode)) + ("-quick" if mode == "quick" else ""))
