"""Every strategy: its rule on a case computed by hand, and the budget in every epoch."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trady_triton.cost import CostModel, LayerShape
from trady_triton.sampling import Pool
from trady_triton.strategies import STRATEGIES, strategy
from trady_triton.strategies.depth import depth_probabilities
from trady_triton.strategies.neurons import weight_cost
from trady_triton.strategies.paca import _largest_rank
from trady_triton.strategies.sparse_update import scheme_cost

BUDGETED = [name for name, entry in STRATEGIES.items() if entry.has_budget]


def layer(channels: int, cost: int, outputs: int = 1) -> LayerShape:
    """A 1x1 convolution whose channel costs `cost` elements: `outputs` weights, and pixels."""
    pixels = cost - outputs
    return LayerShape(channels, outputs, pixels, pixels, pixels, kernel_size=(1, 1))


def pool_of(budget: int, fill: str = "stop", ratios=None, **layers: LayerShape) -> Pool:
    return Pool(layers, CostModel(), budget, fill, seed=1, ratios=ratios or {})


def draw(name: str, pool: Pool, epoch: int = 0, scores=None):
    scores = None if scores is None else {key: torch.tensor(value) for key, value in scores.items()}
    return strategy(name).draw(pool, epoch, scores)


def scores_for(name: str, pool: Pool, seed: int):
    """Random scores of the shape that a strategy wants, or none."""
    entry = strategy(name)
    if entry.scores == "none":
        return None
    generator = torch.Generator().manual_seed(seed)
    sizes = {n: s.out_channels if entry.scores == "velocity" else s.in_channels for n, s in pool.shapes.items()}
    return {name: torch.rand(size, generator=generator) for name, size in sizes.items()}


sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(2, 200), st.integers(1, 9)), min_size=1, max_size=8)


@pytest.mark.parametrize("name", BUDGETED)
@settings(max_examples=25)
@given(sizes=sizes, budget=st.integers(1, 3000), epoch=st.integers(0, 9), fill=st.sampled_from(["stop", "skip"]))
def test_the_budget_holds_in_every_epoch(name, sizes, budget, epoch, fill):
    shapes = {f"l{i}": layer(n, cost + outputs, outputs) for i, (n, cost, outputs) in enumerate(sizes)}
    ratios = dict.fromkeys(shapes, 0.5) if strategy(name).layers == "scheme" else {}
    pool = Pool(shapes, CostModel(), budget, fill, seed=3, ratios=ratios)
    if ratios:
        budget = scheme_cost(pool)
    drawn, again = (strategy(name).draw(pool, epoch, scores_for(name, pool, epoch)) for _ in range(2))
    assert (drawn, drawn.outputs) == (again, again.outputs)
    used = sum(len(ids) * pool.costs[layer] for layer, ids in drawn.items())
    assert (used if drawn.charged is None else drawn.charged) <= budget
    for layer_name, ids in drawn.items():
        assert list(ids) == sorted(set(ids))
        assert all(0 <= channel < shapes[layer_name].in_channels for channel in ids)


def test_oracles_take_the_highest_norms_with_and_without_their_cost():
    pool = pool_of(30, a=layer(2, 10), b=layer(2, 20))
    scores = {"a": [3.0, 1.0], "b": [5.0, 8.0]}  # per cost: 0.3, 0.1 and 0.25, 0.4
    assert draw("d-rgn", pool, scores=scores) == {"a": (0,), "b": (1,)}
    assert draw("s-rgn", pool, scores=scores) == {"a": (0,), "b": (1,)}
    assert draw("d-norm", pool, scores=scores) == {"b": (1,)}  # then b 0, which does not fit, ends the draw


def test_sparse_update_keeps_its_part_of_each_layer_by_weight_norm():
    pool = pool_of(1000, ratios={"a": 0.5, "b": 0.75}, a=layer(5, 10), b=layer(4, 10))
    scores = {"a": [1.0, 5.0, 2.0, 4.0, 3.0], "b": [1.0, 2.0, 3.0, 4.0]}
    assert draw("su", pool, scores=scores) == {"a": (1, 3), "b": (1, 2, 3)}  # int(2.5) and int(3.0)
    assert draw("su-smallest", pool, scores=scores) == {"a": (0, 2), "b": (0, 1, 2)}
    drawn = draw("su-random", pool)
    assert (len(drawn["a"]), len(drawn["b"])) == (2, 3)
    assert scheme_cost(pool) == 50


def test_paca_gives_every_layer_the_same_number_of_channels():
    pool = pool_of(100, a=layer(2, 10), b=layer(9, 20))
    drawn = draw("paca", pool)  # r = 4: 2 * 10 + 4 * 20
    assert (len(drawn["a"]), len(drawn["b"])) == (2, 4)
    assert _largest_rank(pool) == 4
    few = pool_of(20, a=layer(2, 10), b=layer(9, 10), c=layer(2, 10))  # not even one of each
    assert {name: len(ids) for name, ids in draw("paca", few).items()} == {"a": 1, "b": 1}


def test_tinytrain_fills_layer_by_layer():
    # s_a = 6 / (2/8 * 2*3/(8*3)) = 96, s_b = 12 / (1 * 1) = 12: a first, its channels by their own score
    a = LayerShape(2, 1, 3, 3, 3, kernel_size=(1, 1))
    b = LayerShape(8, 1, 3, 3, 3, kernel_size=(1, 1))
    scores = {"a": [2.0, 4.0], "b": [9.0, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4]}
    assert draw("tinytrain", pool_of(12, a=a, b=b), scores=scores) == {"a": (0, 1), "b": (0,)}
    assert draw("tinytrain", pool_of(4, a=a, b=b), scores=scores) == {"a": (1,)}
    scores = {"a": [0.3, 0.3], "b": [1.5] * 8}  # s_a = 9.6, s_b = 12
    assert draw("tinytrain", pool_of(4, a=a, b=b), scores=scores) == {"b": (0,)}


def test_velocity_charges_weights_alone_and_ignores_groups():
    dense = LayerShape(4, 3, 100, 100, 100, kernel_size=(1, 1))  # 4 a neuron
    depthwise = LayerShape(4, 4, 100, 100, 100, groups=4, kernel_size=(3, 3))  # 36 a neuron, though 9 would be right
    pool = pool_of(44, dense=dense, depthwise=depthwise)
    assert (weight_cost(pool, "dense"), weight_cost(pool, "depthwise")) == (4, 36)
    scores = {"dense": [0.1, 0.4, -0.8], "depthwise": [0.0, 7.0, 1.0, 1.0]}  # |v| / cost: .025 .1 .2 and 0 .19 .03 .03
    drawn = draw("velocity", pool, scores=scores)
    assert drawn.outputs == {"dense": (1, 2), "depthwise": (1,)}
    assert drawn == {"dense": (0, 1, 2, 3), "depthwise": (0, 1, 2, 3)}  # the whole input is kept
    assert drawn.charged == 44
    first = [draw("velocity", pool, epoch).outputs for epoch in range(5)]  # nothing to compare with: at random
    assert any(outputs != first[0] for outputs in first)


def test_velocity_full_pays_for_the_input_of_a_layer_once():
    a = LayerShape(2, 4, 10, 10, 10, kernel_size=(1, 1))  # a neuron 2, the input 20
    b = LayerShape(3, 2, 40, 40, 40, kernel_size=(1, 1))  # a neuron 3, the input 120
    pool = pool_of(26, a=a, b=b)
    drawn = draw("velocity-full", pool, scores={"a": [1.0, 4.0, 3.0, 2.0], "b": [9.0, 9.0]})
    assert drawn.outputs == {"a": (1, 2, 3)}
    assert drawn.charged == 20 + 3 * 2
    # with its share of the input a neuron of a costs 7, of b 63: the first of b comes fourth, and does not fit then
    drawn = draw("velocity-full", pool_of(130, a=a, b=b), scores={"a": [1.0, 4.0, 3.0, 2.0], "b": [20.0, 0.0]})
    assert drawn.outputs == {"a": (0, 1, 2, 3)}


def test_neq_freezes_the_neurons_that_have_settled():
    pool = pool_of(1, a=layer(2, 10, outputs=3))
    assert draw("neq", pool).outputs == {"a": (0, 1, 2)}
    assert draw("neq", pool).charged == 2 * 10
    assert draw("neq", pool, 1, {"a": [0.0009, -0.0011, 0.5]}).outputs == {"a": (1, 2)}


def test_medyate_prefers_the_norms_it_saw():
    pool = pool_of(10, a=layer(10, 10))
    norms = [9.0] + [1.0] * 9
    hits = Counter(draw("medyate", pool, epoch, {"a": norms})["a"][0] for epoch in range(2000))
    assert hits[0] / 2000 == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 2000))
    assert draw("medyate", pool, 4) == draw("trady", pool, 4)


def test_cyclic_draws_every_channel_once_before_any_twice():
    pool = pool_of(70, a=layer(7, 10), b=layer(5, 20))  # 12 channels, 170 units: some 2.5 epochs a cycle
    drawn = [draw("cyclic", pool, epoch) for epoch in range(40)]
    counts = Counter()
    for selection in drawn:
        assert all(len(set(ids)) == len(ids) for ids in selection.values())
        assert 50 < sum(len(ids) * pool.costs[name] for name, ids in selection.items()) <= 70  # the next did not fit
        counts.update((name, channel) for name, ids in selection.items() for channel in ids)
        times = [counts[name, channel] for name, size in (("a", 7), ("b", 5)) for channel in range(size)]
        assert max(times) - min(times) <= 1
    assert min(times) > 10
    assert len({repr(selection) for selection in drawn}) > 30  # every cycle has an order of its own
    whole = pool_of(170, a=layer(7, 10), b=layer(5, 20))
    assert [draw("cyclic", whole, epoch) for epoch in range(3)] == [draw("full", whole)] * 3


def test_weighted_probabilities_by_hand():
    # costs 4 and 16, norms 1: weights 1/2 and 1/4; target 100 - 16: 20 l/2 * 4 + 20 l/4 * 16 = 84
    pool = pool_of(100, a=layer(20, 4), b=layer(20, 16), c=layer(2, 26))  # more than a quarter of the budget
    chances = strategy("weighted").inclusion(pool, None)
    assert chances["a"] == pytest.approx([0.35] * 20)
    assert chances["b"] == pytest.approx([0.175] * 20)
    assert chances["c"] == [0.0] * 2
    # norms over their mean 2 and the floor of 0.1: weights 0.1/2 and 2/4; 20 * 0.05 l * 4 + 20 * 0.5 l * 16 = 84
    chances = strategy("weighted").inclusion(
        pool, {"a": torch.zeros(20), "b": torch.full((20,), 0.5), "c": torch.zeros(2)}
    )
    assert chances["a"] == pytest.approx([0.05 * 84 / 164] * 20)
    assert chances["b"] == pytest.approx([0.5 * 84 / 164] * 20)
    whole = pool_of(64, a=layer(4, 4), b=layer(3, 16))
    assert draw("weighted", whole) == {"a": (0, 1, 2, 3), "b": (0, 1, 2)}


def test_weighted_draws_keep_the_budget_where_cheap_and_dear_layers_alternate():
    # chances 1/2 and 2 * 1/4: in this order all marks would hit cheap layers, or all of them dear ones
    pool = pool_of(116, **{f"{i:02}": layer(2, 16) if i % 2 else layer(1, 4) for i in range(20)})
    assert strategy("weighted").inclusion(pool, None)["01"] == pytest.approx([0.25] * 2)
    for epoch in range(10):
        assert sum(len(ids) * pool.costs[name] for name, ids in draw("weighted", pool, epoch).items()) <= 116


def test_weighted_draws_each_channel_with_its_probability():
    pool = pool_of(100, a=layer(12, 4), b=layer(15, 16))
    scores = {"a": [float(i + 1) for i in range(12)], "b": [float(i % 5 + 1) for i in range(15)]}
    tensors = {name: torch.tensor(value) for name, value in scores.items()}
    chances = strategy("weighted").inclusion(pool, tensors)
    assert max(chances["a"]) == 1.0  # the cap at 1 is met
    counts, epochs = Counter(), 1500
    for epoch in range(epochs):
        for name, ids in strategy("weighted").draw(pool, epoch, tensors).items():
            counts.update((name, channel) for channel in ids)
    for name, values in chances.items():
        for channel, p in enumerate(values):
            assert counts[name, channel] / epochs == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / epochs) + 1e-9)


@pytest.mark.parametrize("norm", [0.0, 1e-320, math.inf, math.nan])
def test_weighted_draws_as_without_scores_where_they_say_nothing(norm):
    pool = pool_of(100, a=layer(20, 4), b=layer(20, 16))
    drawn = draw("weighted", pool, 1, {"a": [norm] * 20, "b": [norm] * 20})
    assert drawn == draw("weighted", pool, 1)
    assert 0 < sum(len(ids) * pool.costs[name] for name, ids in drawn.items()) <= 100


def exact_chance(room: int, own: tuple[int, int], other: tuple[int, int]) -> float:
    """P(what comes before a channel in a random order of two kinds, of these numbers and costs, is within `room`)."""
    (n, cost), (m, other_cost) = own, other
    ways = (
        math.comb(n - 1, i) * math.comb(m, j) / math.comb(n - 1 + m, i + j)
        for i in range(n)
        for j in range(m + 1)
        if i * cost + j * other_cost <= room
    )
    return sum(ways) / (n + m)


@pytest.mark.parametrize("budget", [150, 600])
def test_uniform_probabilities_are_those_of_the_draw(budget):
    chances = strategy("trady").inclusion(pool_of(budget, a=layer(60, 4), b=layer(50, 30), c=layer(3, 700)), None)
    assert chances["a"] == pytest.approx([exact_chance(budget - 4, (60, 4), (50, 30))] * 60, rel=0.01)
    assert chances["b"] == pytest.approx([exact_chance(budget - 30, (50, 30), (60, 4))] * 50, rel=0.01)
    assert chances["c"] == [0.0] * 3
    assert strategy("trady").inclusion(pool_of(27, a=layer(3, 9)), None) == {"a": [1.0] * 3}
    assert strategy("trady").inclusion(pool_of(9, a=layer(2, 9)), None)["a"][0] > 0.1


def test_ends_of_the_scale():
    pool = pool_of(1, a=layer(2, 10), b=layer(3, 20))
    assert draw("full", pool) == {"a": (0, 1), "b": (0, 1, 2)}
    assert draw("head", pool) == draw("bias", pool) == {}
    assert not STRATEGIES["head"].trains_bias
    assert STRATEGIES["bias"].trains_bias


def test_depths_are_as_even_as_their_mean_allows():
    assert depth_probabilities([0, 10, 20], 10).tolist() == pytest.approx([1 / 3] * 3)
    p = depth_probabilities([0, 10, 20], 5)
    assert float(p @ torch.tensor([0.0, 10, 20], dtype=torch.float64)) == pytest.approx(5)
    assert float(p[0] / p[1]) == pytest.approx(float(p[1] / p[2]))  # exponential in the cost
    assert depth_probabilities([0, 10, 20], 0).tolist() == pytest.approx([1, 0, 0], abs=1e-9)
    assert depth_probabilities([0, 10**13, 2 * 10**13], 5e12).tolist() == pytest.approx(p.tolist())
    assert depth_probabilities([0], 0).tolist() == [1]
    with pytest.raises(ValueError, match="shallowest choice takes 5"):
        depth_probabilities([5, 10], 4)


def test_an_unknown_sampler_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"sampler 'lora': wanted one of trady, s-topk"):
        strategy("lora")
