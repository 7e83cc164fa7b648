"""How often channels are drawn anew."""

from __future__ import annotations


def check_every(every: int | str) -> int | str:
    """`every`, which is "epoch" or a number of optimizer steps.

    Raises:
        ValueError: it is neither.
    """
    if every == "epoch" or (isinstance(every, int) and not isinstance(every, bool) and every > 0):
        return every
    raise ValueError(f"every {every!r}: wanted 'epoch' or a positive number of optimizer steps")
