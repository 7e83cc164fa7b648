"""TinyTrain: layers by Fisher information per weight and MAC, channels inside by their own (Kwon et al., ICML 2024)."""

from __future__ import annotations

from trady_triton.sampling import Pool, Scores, Selection


def draw_by_fisher(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """Layers by s_i = P_i / (|W_i| / max |W| * M_i / max M), their channels by Delta_c, until the budget is full.

    Delta_c = 1/(2N) sum_n (sum_d a_nd g_nd)^2 is the score of channel c: activation times gradient, one backward pass
    over a few samples, once before training; P_i is its sum over the layer, |W_i| its weights, M_i its MACs.
    Uncertain in the source: how many channels of a layer are taken (here all that fit), whether channels are inputs or
    outputs (here inputs), and a limit on depth (here none). Its meta-training before deployment is left out.
    """
    assert scores is not None

    def layer_score(name: str) -> float:  # the maxima divide all alike
        shape = pool.shapes[name]
        return float(scores[name].sum()) / (shape.weights * shape.dense_flops)

    ranks = {name: rank for rank, name in enumerate(sorted(pool.shapes, key=layer_score, reverse=True))}
    inside = pool.by_score(scores, per_cost=False)
    return pool.take(sorted(inside, key=lambda unit: ranks[unit[0]]))
