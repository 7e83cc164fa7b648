"""MeDyate: channels drawn by the gradient norm last seen, in layers ranked by LaRa (arXiv 2510.20979)."""

from __future__ import annotations

import torch

from trady_triton.sampling import Pool, Scores, Selection, epoch_generator
from trady_triton.strategies.uniform import draw_uniform


def draw_by_norm_seen(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """The first epoch uniform, then without replacement with weight N_c, the norm when channel c was last trained.

    A channel that was never trained has the largest norm of the first epoch (optimism), and keeps it until it is
    drawn. Keys Exp(1) / N_c in ascending order are a weighted order without replacement (Efraimidis and Spirakis).
    N_c is the root mean square over an epoch's steps of the norm of the compact gradient; the source does not say
    which norm of an epoch it means.
    """
    if scores is None:
        return draw_uniform(pool, epoch)
    generator = epoch_generator(pool.seed, epoch)
    weights = torch.tensor([float(value) for value in _flat(pool, scores)], dtype=torch.float64)
    keys = torch.empty_like(weights).exponential_(generator=generator) / weights
    return pool.take([pool.units[i] for i in keys.argsort(stable=True).tolist()])


def _flat(pool: Pool, scores: Scores) -> list[float]:
    values = {name: scores[name].tolist() for name in pool.shapes}
    return [values[name][channel] for name, channel in pool.units]
