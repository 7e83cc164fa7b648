"""The paper's measurements against known cases and scipy."""

import math

import pytest
import scipy.stats
import torch

from trady_triton.stats import TailIndex, better, coverage, paired_t_test, ranks, spearman, t_test


def stable(alpha: float, count: int) -> torch.Tensor:
    """Symmetric alpha-stable numbers by Chambers, Mallows and Stuck."""
    generator = torch.Generator().manual_seed(0)
    angle = (torch.rand(count, generator=generator, dtype=torch.float64) - 0.5) * math.pi
    wait = torch.empty(count, dtype=torch.float64).exponential_(generator=generator)
    if alpha == 1:
        return angle.tan()
    return (alpha * angle).sin() / angle.cos() ** (1 / alpha) * (((1 - alpha) * angle).cos() / wait) ** (1 / alpha - 1)


@pytest.mark.parametrize("alpha", [0.8, 1.0, 1.5, 2.0])
def test_tail_index_of_stable_noise(alpha):
    meter = TailIndex(500)
    for chunk in stable(alpha, 500_000).split(50_000):
        meter.update(chunk)
    assert meter.alpha == pytest.approx(alpha, rel=0.03)


def test_tail_index_by_hand():
    meter = TailIndex(2)
    meter.update(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))  # the zero is left out, and then the 2, which has no partner
    assert meter.alpha == pytest.approx(math.log(2) / (math.log(4) - (math.log(1) + math.log(3)) / 2))
    assert math.isnan(TailIndex(2).alpha)
    with pytest.raises(ValueError, match="m 1"):
        TailIndex(1)


def test_a_mixture_of_gaussian_scales_looks_heavy_tailed():
    noise = stable(2.0, 400_000)
    scales = torch.tensor([1.0, 100.0], dtype=torch.float64).repeat_interleave(200_000)
    meter = TailIndex(600)
    meter.update((noise * scales)[torch.randperm(400_000, generator=torch.Generator().manual_seed(1))])
    assert meter.alpha < 1.8


def test_rank_correlation_is_scipys():
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 9, (40,), generator=generator).double()
    y = x + 3 * torch.randn(40, generator=generator).double()
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    with pytest.raises(ValueError, match="shapes"):
        spearman(x, y[:3])


@pytest.mark.parametrize("shift", [0.0, 0.4, -3.0])
def test_t_tests_are_scipys(shift):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(12, generator=generator).double()
    y = x + shift + torch.randn(12, generator=generator).double()
    ours, theirs = t_test(x.tolist(), y.tolist()[:9]), scipy.stats.ttest_ind(x, y[:9])
    assert (ours.t, ours.freedom, ours.p) == pytest.approx((theirs.statistic, theirs.df, theirs.pvalue))
    ours, theirs = paired_t_test(x.tolist(), y.tolist()), scipy.stats.ttest_rel(x, y)
    assert (ours.t, ours.freedom, ours.p) == pytest.approx((theirs.statistic, theirs.df, theirs.pvalue))
    one_sided = scipy.stats.ttest_rel(x, y, alternative="greater").pvalue
    assert better(x.tolist(), y.tolist()) == pytest.approx(one_sided)


def test_equal_pairs_differ_in_nothing():
    assert paired_t_test([1.0, 2.0], [1.0, 2.0]).p == 1
    assert paired_t_test([2.0, 3.0], [1.0, 2.0]).p == 0
    with pytest.raises(ValueError, match="1 and 1 values"):
        paired_t_test([1.0], [2.0])


def test_coverage_counts_each_channel_once():
    draws = [{"a": (0, 1)}, {"a": (1,), "b": (2,)}, {"b": (2,)}]
    assert coverage(draws, {"a": 4, "b": 4}) == [0.25, 0.375, 0.375]
