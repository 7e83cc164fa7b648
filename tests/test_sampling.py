"""The draw: budget, uniformity, purity."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from toys import toy_net, toy_plan

from trady_triton.cost import CostModel, LayerShape
from trady_triton.sampling import Pool, epoch_generator, fill
from trady_triton.strategies import STRATEGIES


def draw_uniform(channels, costs, budget, *, rule, seed, epoch):
    """TraDy's draw from layers of these sizes: one tuple of ids a layer."""
    shapes = {
        f"layer {i}": LayerShape(count, 1, cost, cost, cost - 1, kernel_size=(1, 1))
        for i, (count, cost) in enumerate(zip(channels, costs, strict=True))
    }
    drawn = STRATEGIES["trady"].draw(Pool(shapes, CostModel(), budget, rule, seed), epoch, None)
    return [drawn[name] for name in shapes]


pools = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300)), min_size=1, max_size=12)


@given(pools, st.integers(1, 5000), st.sampled_from(["stop", "skip"]), st.integers(0, 9), st.integers(0, 99))
def test_the_budget_is_never_exceeded(pool, budget, rule, seed, epoch):
    channels, costs = zip(*pool, strict=True)
    drawn = draw_uniform(channels, costs, budget, rule=rule, seed=seed, epoch=epoch)
    assert sum(len(ids) * cost for ids, cost in zip(drawn, costs, strict=True)) <= budget
    for ids, count in zip(drawn, channels, strict=True):
        assert list(ids) == sorted(set(ids))
        assert all(0 <= channel < count for channel in ids)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(0, 400))
def test_stop_ends_at_the_first_that_does_not_fit_and_skip_goes_on(costs, budget):
    stopped = fill(costs, budget, "stop")
    assert stopped == list(range(len(stopped)))
    if len(stopped) < len(costs):
        assert sum(costs[: len(stopped) + 1]) > budget
    left = budget
    for position, cost in enumerate(costs):
        taken = position in fill(costs, budget, "skip")
        assert taken == (cost <= left)
        left -= cost * taken


@given(pools, st.integers(0, 9), st.integers(0, 99))
def test_skip_leaves_nothing_that_would_fit(pool, seed, epoch):
    channels, costs = zip(*pool, strict=True)
    drawn = draw_uniform(channels, costs, 700, rule="skip", seed=seed, epoch=epoch)
    left = 700 - sum(len(ids) * cost for ids, cost in zip(drawn, costs, strict=True))
    assert all(cost > left for ids, count, cost in zip(drawn, channels, costs, strict=True) if len(ids) < count)


def test_inclusion_is_uniform_by_chi_square():
    counts = Counter()
    epochs, drawn_each = 4000, 12
    for epoch in range(epochs):
        for layer, ids in enumerate(draw_uniform([20, 30], [5, 5], 60, rule="stop", seed=3, epoch=epoch)):
            counts.update((layer, channel) for channel in ids)
    assert sum(counts.values()) == epochs * drawn_each
    p = drawn_each / 50
    chi_square = sum((counts[layer, c] - epochs * p) ** 2 for layer, n in ((0, 20), (1, 30)) for c in range(n))
    chi_square /= epochs * p * (1 - p) * 50 / 49  # sampling without replacement: sums to 49 degrees of freedom
    assert chi_square < 85.35  # the 99.9 % quantile of chi-square with 49 degrees of freedom


def test_channels_that_can_never_fit_do_not_end_the_draw():
    drawn = draw_uniform([1000, 5], [101, 10], 100, rule="stop", seed=0, epoch=0)
    assert [len(ids) for ids in drawn] == [0, 5]


def test_a_layer_without_drawn_channels_is_absent_and_reads_as_empty():
    plan = toy_plan(toy_net(), 160)  # a channel or two, of the five layers of the pool
    drawn = plan.sample(0)
    assert 0 < len(drawn) < len(plan.pool)
    assert all(ids for ids in drawn.values())
    assert all(drawn[name] == () for name in set(plan.pool) - set(drawn))


def test_epochs_and_seeds_differ():
    draws = [draw_uniform([100], [1], 10, rule="stop", seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(draw[0]) for draw in draws}) == 4
    seeds = [epoch_generator(3, 5, purpose).initial_seed() for purpose in ("", "depth")]
    assert seeds == [1322184803, 3840743025]  # plans of older versions draw what they drew, in every process
    assert toy_plan(toy_net()).sample(5) == {
        "tokens": (0, 3, 4, 5),
        "pointwise": (5, 7, 8, 10, 11),
        "grouped": (0, 2, 7, 11, 14),
        "depthwise": (0, 2, 4, 5, 7),
        "stem": (0, 1),
    }
