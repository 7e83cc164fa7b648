"""The ends of the scale: everything, or nothing but the head and perhaps the biases."""

from __future__ import annotations

from trady_triton.sampling import Pool, Scores, Selection


def draw_everything(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """Every channel of every layer: full fine-tuning, "Baseline" in arXiv 2510.19675. No budget."""
    return pool.select((name, c) for name, shape in pool.shapes.items() for c in range(shape.in_channels))


def draw_nothing(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """No channel: the head alone, or the head and the biases (TinyTL, arXiv 2007.11622)."""
    return Selection()


def whole_inclusion(pool: Pool, scores: Scores | None = None) -> dict[str, list[float]]:
    """Every channel is drawn for certain."""
    return {name: [1.0] * shape.in_channels for name, shape in pool.shapes.items()}
