"""Work on a batch in parts, so that temporaries of full precision stay an eighth of it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """At most eight views of each tensor along its first dimension, together; all have the same first dimension."""
    rows = (tensor.view(1) if tensor.dim() == 0 else tensor for tensor in tensors)
    return zip(*(tensor.chunk(8) for tensor in rows), strict=True)
