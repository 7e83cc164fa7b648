"""The paper's oracles, which take the channels of largest gradient: D-Det RGN, S-Det RGN and D-Det Raw Norm.

Their scores are the norms g_c of the gradient over the whole training set, weights untouched: an extra forward and
backward pass over everything, with every channel's gradient and input kept. So they break the budget by design.
"""

from __future__ import annotations

from trady_triton.sampling import Pool, Scores, Selection


def draw_by_rgn(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """Channels by RGN_c = g_c / cost_c, highest first (D-Det and S-Det RGN; arXiv 2510.19675, section 5, eq. 7).

    Uncertain: whether the published pass runs in train or eval mode, and with augmentation; here as training does.
    """
    assert scores is not None
    return pool.take(pool.by_score(scores, per_cost=True))


def draw_by_norm(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """Channels by g_c alone, highest first (D-Det Raw Norm; arXiv 2510.19675, Fig. 11)."""
    assert scores is not None
    return pool.take(pool.by_score(scores, per_cost=False))
