"""The paper's setting: the order of its Fig. 9 and its smallest budget, and what training adds to inference there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

import trady_triton.models  # noqa: F401  registers the net
from trady_triton import Plan, Ranking, ledger, make_plan, rank_layers
from trady_triton.bench.tables import markdown
from trady_triton.ledger import Ledger
from trady_triton.ranking import LayerNorms

NET = "mobilenetv2_w035"
SHAPE = (1, 3, 128, 128)
BUDGET = 27946  # elements
FIGURE_9: dict[str, Any] = json.loads(Path(__file__).with_name("fig9.json").read_text())


def paper_ranking() -> Ranking:
    """The layer norms of Fig. 9, spread evenly over the channels of each layer."""
    net = timm.create_model(NET, num_classes=10)
    layers = rank_layers(net, [(torch.randn(SHAPE), torch.tensor([0]))], F.cross_entropy).layers
    sizes = [layer.shape.in_channels for layer in layers]
    norms = [(raw / size,) * size for raw, size in zip(FIGURE_9["raw"], sizes, strict=True)]
    return Ranking(tuple(LayerNorms(x.name, x.shape, n) for x, n in zip(layers, norms, strict=True)), ("fc",), 1)


def paper_plan(ranking: Ranking, budget: int = BUDGET, **options: Any) -> Plan:
    """A plan by the paper's own costs."""
    return make_plan(ranking, budget=budget, cost_model="paper", **options)


def added_bytes(books: Ledger) -> dict[str, int]:
    """All that a step adds to inference, by what it is for."""
    return {
        "stores and gradients of drawn channels": books.kept_by_kind["trained channels"] + books.compact_gradient_bytes,
        "masks, one bit for each element that an activation clipped": books.kept_by_kind["activation"],
        "input and gradient of the head": books.kept_by_kind["conv and linear"] + books.whole_gradient_bytes,
        "ids of the channels": books.draw_bytes,
        "the loss": books.kept_by_kind["other"],
    }


def count() -> dict[str, Any]:
    """The bytes of epoch 0, and of the paper's count of its budget."""
    books = ledger(timm.create_model(NET, num_classes=10), paper_plan(paper_ranking()), SHAPE)
    return {"added": added_bytes(books), "paper": 4 * BUDGET}


def setting_table(row: dict[str, Any]) -> str:
    """What is added, a row a purpose."""
    rows = [
        *row["added"].items(),
        ("in all", sum(row["added"].values())),
        ("the paper's count of its budget", row["paper"]),
    ]
    return markdown(("epoch 0", "bytes", "KiB"), [(name, f"{size:,}", f"{size / 1024:.1f}") for name, size in rows])
