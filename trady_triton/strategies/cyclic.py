"""Cyclic draws: every channel of the pool once before any is drawn twice."""

from __future__ import annotations

from trady_triton.sampling import Pool, Scores, Selection, Unit, epoch_generator, fill


def draw_next(pool: Pool, epoch: int, scores: Scores | None = None) -> Selection:
    """The next channels of a random order, from where the last epoch ended; a new order where one is used up.

    Independent draws of a share alpha of the pool leave (1 - alpha)^e of it untouched after e epochs; this reaches all
    of it in about 1 / alpha. BAdam (arXiv 2404.02827) runs over its blocks alike. An epoch that ends one order begins
    the next, with what it has not drawn yet.
    """
    queue: list[Unit] = []
    chunk: list[Unit] = []
    cycle = 0
    for _ in range(epoch + 1):
        chunk = _taken(pool, queue, [])
        queue = queue[len(chunk) :]
        if not queue:
            drawn = set(chunk)
            order = pool.permuted(epoch_generator(pool.seed, cycle, "cycle"))
            cycle += 1
            fresh = [unit for unit in order if unit not in drawn]
            more = _taken(pool, fresh, chunk)
            queue = fresh[len(more) :] + [unit for unit in order if unit in drawn]
            chunk = chunk + more
    return pool.select(chunk)


def _taken(pool: Pool, queue: list[Unit], before: list[Unit]) -> list[Unit]:
    used = sum(pool.costs[name] for name, _ in before)
    return queue[: len(fill([pool.costs[name] for name, _ in queue], pool.budget - used, "stop"))]
