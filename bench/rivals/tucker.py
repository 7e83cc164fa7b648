"""A low-rank store of activations, from the description of ASI (Nguyen et al., ICML 2025) and HOSVD (NeurIPS 2024).

x [d0, ..., dm] ~ S x_0 U0 ... x_m Um with S [r0, ..., rm], Ui [di, ri]; each step refines the last step's Ui by one
subspace iteration. dW is computed from S and U without the whole x: dY is projected on the batch mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trady_triton.bench.training import Setup


class Tucker:
    """The store of one layer. All modes have one rank, the largest that fits the layer's share of B_mem."""

    def __init__(self, setup: Setup, layer: str) -> None:
        share = setup.plan().budget // len(setup.pool)
        self.limit: int = setup.options.get("elements", share // (setup.net.autocast or torch.float32).itemsize)
        self.bases: list[Tensor] = []

    def compress(self, x: Tensor) -> tuple[Tensor, ...]:
        """(core, U0, ..., Um)."""
        rank, work = _rank(x.shape, self.limit), x if x.dtype == torch.float64 else x.float()
        if [basis.shape[0] for basis in self.bases] != list(x.shape):
            ranks = [min(rank, size, x.numel() // size) for size in x.shape]  # an unfolding has no higher one
            self.bases = [torch.randn(size, r, dtype=work.dtype, device=x.device)
                          for size, r in zip(x.shape, ranks, strict=True)]  # fmt: skip
        core = work
        for mode, basis in enumerate(self.bases):
            rows = work.movedim(mode, 0).flatten(1)
            self.bases[mode] = torch.linalg.qr(rows @ (rows.T @ basis))[0]
            core = _along(core, self.bases[mode].T, mode)
        return tuple(part.to(x.dtype) for part in (core, *self.bases))

    def wgrad(self, kept: tuple[Tensor, ...], dy: Tensor, layer: nn.Module) -> Tensor:
        """dW of the compressed input: all modes but the batch are restored, dY is projected on that one."""
        from trady_triton.bench.rivals.compressed import weight_gradient

        x, *bases = kept
        for mode, basis in enumerate(bases[1:], 1):
            x = _along(x, basis, mode)
        return weight_gradient(x, _along(dy, bases[0].T.to(dy.dtype), 0), layer)


def _along(x: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """x times a matrix [new, old] along one mode."""
    return torch.tensordot(matrix, x, ([1], [mode])).movedim(0, mode)


def _rank(sizes: Any, limit: int) -> int:
    """The largest rank whose core and factors have at most `limit` elements; at least 1."""
    rank = 1
    while rank < max(sizes):
        ranks = [min(size, rank + 1) for size in sizes]
        if torch.Size(ranks).numel() + sum(size * r for size, r in zip(sizes, ranks, strict=True)) > limit:
            break
        rank += 1
    return rank
