"""What a benchmark runs: settings.json by mode, and where results go."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from trady_triton.bench.circumstances import slug
from trady_triton.bench.nets import Net

MODES = ("cpu", "quick", "cuda")
RESULTS = Path("bench/results")


def runnable(mode: str) -> str:
    """The mode, as an option of a command.

    Raises:
        typer.BadParameter: there is no such mode, or none of its devices here.
    """
    if mode not in MODES:
        raise typer.BadParameter(f"{mode!r}: wanted one of {', '.join(MODES)}")
    if device_of(mode) == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"there is no CUDA device here, or torch {torch.__version__} cannot use it")
    return mode


Mode = Annotated[str, typer.Option(help="cpu, quick or cuda.", callback=runnable)]


def settings(mode: str) -> dict[str, Any]:
    """Nets, budgets and repeats of a mode."""
    content: dict[str, Any] = json.loads((files("trady_triton.bench") / "settings.json").read_text())
    if mode not in content:
        raise ValueError(f"mode {mode!r}: wanted one of {', '.join(content)}")
    return content[mode]


def nets_of(mode: str, names: list[str] | None = None) -> list[Net]:
    """The nets of a mode, or those of them that are named."""
    content = settings(mode)["nets"]
    chosen = content if names is None else {name: content[name] for name in names}
    return [_net(mode, name, sizes) for name, sizes in chosen.items()]


def bars_nets_of(mode: str) -> list[Net]:
    """The nets on which TraDy's step is timed beside plain PyTorch's with the same layers frozen."""
    content = settings(mode)["bars"]
    return [_net(mode, name, content) for name in content["nets"]]


def _net(mode: str, name: str, sizes: dict[str, Any]) -> Net:
    content = settings(mode)
    autocast = getattr(torch, content["autocast"]) if "autocast" in content else None
    last = content.get("channels_last", False)
    return Net(name, sizes["batch"], sizes["image_size"], device_of(mode), autocast, last)


def device_of(mode: str) -> str:
    """cpu or cuda."""
    return "cuda" if mode == "cuda" else "cpu"


def results_folder(mode: str, out: Path = RESULTS) -> Path:
    """Where a mode's results go: a folder a device, quick ones apart."""
    return out / (slug(device_of(mode)) + ("-quick" if mode == "quick" else ""))
