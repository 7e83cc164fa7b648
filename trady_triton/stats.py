"""The paper's measurements, as functions of tensors: tail index, rank correlations, coverage, paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class TailIndex:
    """Tail index alpha of symmetric stable noise by the estimator of Mohammadi et al. 2015, one chunk at a time.

    For N values X and their sums Y over m consecutive ones, 1 / alpha = (mean log|Y| - mean log|X|) / log m: 2 for
    Gaussian noise, less for heavier tails. `m` is fixed beforehand; zeros, which are dead units and no noise, and the
    values at a chunk's end that do not fill a sum are left out. A mixture of scales, such as all layers of a network
    at once, lowers the estimate even where every part is Gaussian: measure layer by layer as well.
    """

    def __init__(self, m: int) -> None:
        if m < 2:
            raise ValueError(f"m {m!r}: wanted at least 2 values in a sum")
        self.m = m
        self._values = self._sums = 0
        self._log_values = self._log_sums = 0.0

    def update(self, values: Tensor) -> None:
        """Add a chunk of any shape."""
        flat = values.detach().flatten()
        flat = flat[flat != 0]
        flat = flat[: flat.numel() // self.m * self.m].double()
        if flat.numel() == 0:
            return
        tiny = math.ulp(1.0)
        sums = flat.view(-1, self.m).sum(1)
        self._log_values += float((flat.abs() + tiny).log().sum())
        self._log_sums += float((sums.abs() + tiny).log().sum())
        self._values += flat.numel()
        self._sums += sums.numel()

    @property
    def alpha(self) -> float:
        """The estimate; nan before the first sum."""
        if self._sums == 0:
            return math.nan
        rise = self._log_sums / self._sums - self._log_values / self._values
        return math.log(self.m) / rise if rise > 0 else math.inf


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values their mean rank: [n] -> [n] float64."""
    below = (values[None, :] < values[:, None]).sum(1)
    same = (values[None, :] == values[:, None]).sum(1)
    return below.double() + (same.double() + 1) / 2


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of two vectors [n], ties by mean rank; nan where one is constant."""
    if x.shape != y.shape or x.dim() != 1 or x.numel() < 2:
        raise ValueError(f"shapes {tuple(x.shape)} and {tuple(y.shape)}: wanted two vectors of the same length, over 1")
    return float(torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1])


@dataclass(frozen=True)
class TTest:
    """Student's t statistic, its degrees of freedom and the two-sided p."""

    t: float
    freedom: int
    p: float


def t_test(x: Sequence[float], y: Sequence[float]) -> TTest:
    """Unpaired test of equal means under equal variances, the paper's between the channels of two runs.

    Says nothing about whether the two rank alike: see `spearman`.
    """
    a, b = (torch.tensor(list(values), dtype=torch.float64) for values in (x, y))
    freedom = a.numel() + b.numel() - 2
    pooled = float(((a - a.mean()).square().sum() + (b - b.mean()).square().sum()) / freedom)
    error = math.sqrt(pooled * (1 / a.numel() + 1 / b.numel()))
    return _result(float(a.mean() - b.mean()), error, freedom)


def paired_t_test(x: Sequence[float], y: Sequence[float]) -> TTest:
    """Test of equal means of pairs, such as two strategies under the same conditions."""
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"{len(x)} and {len(y)} values: wanted as many pairs, at least 2")
    difference = torch.tensor(list(x), dtype=torch.float64) - torch.tensor(list(y), dtype=torch.float64)
    error = float(difference.std(correction=1)) / math.sqrt(len(x))
    return _result(float(difference.mean()), error, len(x) - 1)


def better(x: Sequence[float], y: Sequence[float]) -> float:
    """One-sided p of the paired test that x is greater than y: small where it clearly is (the paper's Fig. 4)."""
    test = paired_t_test(x, y)
    return test.p / 2 if test.t > 0 else 1 - test.p / 2


def coverage(draws: Sequence[Mapping[str, Sequence[int]]], channels: Mapping[str, int]) -> list[float]:
    """Share of all channels that were drawn at least once, after each epoch. `channels`: layer -> how many."""
    seen: set[tuple[str, int]] = set()
    total = sum(channels.values())
    shares = []
    for draw in draws:
        seen.update((layer, channel) for layer, ids in draw.items() for channel in ids)
        shares.append(len(seen) / total)
    return shares


def _result(difference: float, error: float, freedom: int) -> TTest:
    if error == 0:
        return TTest(0.0 if difference == 0 else math.copysign(math.inf, difference), freedom, float(difference == 0))
    t = difference / error
    return TTest(t, freedom, _two_sided(t, freedom))


def _two_sided(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's distribution: the regularised incomplete beta I_x(freedom/2, 1/2)."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function by its continued fraction (Lentz)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 300):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + numerator * d)
            c = 1 + numerator / c
            fraction *= c * d
    return front * fraction
