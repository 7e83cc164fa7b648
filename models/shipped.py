"""Rankings of the nets whose weights were at hand, as data in `rankings/`: importance is a property of the net.

Each file is a ranking as `Ranking.save` writes it, and says under `made` how it was made.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from trady_triton.cost import LayerShape
from trady_triton.ranking import Ranking

FOLDER = Path(__file__).parent / "rankings"


def ranking_for(model: nn.Module, image_size: int | None = None) -> Ranking | None:
    """The shipped ranking of this network, or None.

    A ranking fits if the model's convolutions and Linear layers outside the head have its names and sizes, and if
    it was made at this image size (None: whatever it is).
    """
    sizes = {name: tuple(module.weight.shape) for name, module in model.named_modules()
             if isinstance(module, nn.Conv2d | nn.Linear)}  # fmt: skip
    for path in sorted(FOLDER.glob("*.json")):
        content = json.loads(path.read_text())
        if image_size is not None and content["made"]["image_size"] != image_size:
            continue
        ranking = read_shipped(path)
        layers = {layer.name: _weight_shape(layer.shape) for layer in ranking.layers}
        if layers == {name: shape for name, shape in sizes.items() if name not in ranking.head}:
            return ranking
    return None


def how_made(model: nn.Module, image_size: int | None = None) -> str:
    """One sentence on where the shipped ranking of this network comes from."""
    ranking = ranking_for(model, image_size)
    for path in sorted(FOLDER.glob("*.json")) if ranking is not None else ():
        if read_shipped(path) == ranking:
            made = json.loads(path.read_text())["made"]
            return f"ranking shipped for {made['net']}: {made['how']}"
    raise ValueError("no ranking is shipped for this model")


def read_shipped(path: Path) -> Ranking:
    """A ranking file with its `made` left aside."""
    return Ranking.from_dict(json.loads(path.read_text()))


def _weight_shape(shape: LayerShape) -> tuple[int, ...]:
    return (shape.out_channels, shape.in_channels // shape.groups, *shape.kernel_size)
