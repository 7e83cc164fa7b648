"""The promise: no step of any epoch takes more than the memory that the plan was made for."""

import re
from dataclasses import replace
from random import Random

import pytest
import timm
import torch
import torch.nn.functional as F
from nn.nets import shapes_in_order
from torch import Tensor, nn
from toys import toy_batches, toy_net, toy_ranking

from trady_triton import Plan, Ranking, TraDyOptimizer, apply_plan, make_plan, measure, rank_layers, remove_plan
from trady_triton.cost import STORE_BITS
from trady_triton.policy import Policy
from trady_triton.promise import bound
from trady_triton.ranking import LayerNorms, find_head
from trady_triton.rehearsal import fake_copy, fake_step
from trady_triton.search import WAYS

SHAPE = (8, 3, 12, 12)


def toy() -> tuple[nn.Module, Ranking]:
    net = toy_net(torch.float32)
    return net, toy_ranking(net)


def smallest(net: nn.Module, ranking: Ranking, **options: object) -> int:
    """The figure that a refusal names."""
    with pytest.raises(ValueError, match="smallest workable") as refusal:
        make_plan(ranking, memory=100, model=net, input_shape=SHAPE, **options)
    return int(re.search(r"memory is (\d+) bytes", str(refusal.value))[1])


def measured_totals(net: nn.Module, plan: Plan, x: Tensor, y: Tensor, epochs: int, **options: object) -> list[int]:
    """Memory of a step in each epoch, with a weight decay."""
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1, weight_decay=0.01, **options)
    totals = []
    for epoch in range(epochs):
        optimizer.resample(epoch)
        totals.append(measure(net, optimizer, x, y).total_bytes)
    remove_plan(net)
    return totals


@pytest.mark.parametrize("factor", [1.0, 1.1, 1.5, 3.0])
def test_no_epoch_exceeds_the_memory(factor: float) -> None:
    net, ranking = toy()
    memory = int(factor * smallest(net, ranking))
    plan = make_plan(ranking, memory=memory, model=net, input_shape=SHAPE, coverage=1.0)
    totals = measured_totals(net, plan, torch.randn(SHAPE), torch.arange(8) % 5, epochs=10)
    assert max(totals) <= memory == plan.memory


@pytest.mark.parametrize(("optimizer", "options"), [("momentum", {"momentum": 0.9}), ("adamw", {"algorithm": "adamw"})])
def test_no_epoch_exceeds_the_memory_with_the_optimizers_state(optimizer: str, options: dict[str, object]) -> None:
    net, ranking = toy()
    memory = int(1.1 * smallest(net, ranking, optimizer=optimizer))
    plan = make_plan(ranking, memory=memory, model=net, input_shape=SHAPE, coverage=1.0, optimizer=optimizer)
    totals = measured_totals(net, plan, torch.randn(SHAPE), torch.arange(8) % 5, epochs=10, **options)
    assert max(totals) <= memory


NETS = {
    "toy": (12, {}),
    "mobilenetv2_035": (32, {}),
    "mobilenetv3_small_050": (48, {}),
    "regnety_002": (32, {}),
    "convnext_atto": (32, {"depths": (1, 1, 2, 1)}),
    "vit_tiny_patch16_224": (48, {"img_size": 48, "depth": 2}),
}


@pytest.mark.parametrize(
    "seed", [0, 4, 5, 10, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 6, 7, 8, 9))]
)
def test_a_random_promise_is_kept(seed: int) -> None:
    """A random net, memory, batch and whatever may be given up: no epoch takes more, nor does any layer alone."""
    random = Random(seed)
    torch.manual_seed(seed)
    name = sorted(NETS)[seed % len(NETS)]
    net, ranking, size = whole_network(name)
    allow = random.sample(WAYS, random.randint(0, len(WAYS)))
    x, y = torch.randn(random.choice([1, 3, 4]), 3, size, size), torch.zeros(1, dtype=torch.int64)
    options = {"model": net, "input_shape": x.shape, "allow": allow, "coverage": random.choice([0.5, 1.0])}
    with pytest.raises(ValueError, match="smallest workable") as refusal:
        make_plan(ranking, memory=100, **options)
    memory = int(random.choice([1.0, 1.02, 1.3, 2.0]) * int(re.search(r"memory is (\d+) bytes", str(refusal.value))[1]))
    plan = make_plan(ranking, memory=memory, **options)
    assert max(measured_totals(net, plan, x, y.expand(len(x)).clone(), epochs=3)) <= memory
    policy = plan.policy
    assert "micro_batch" in allow or plan.micro_batch is None
    assert "activations" in allow or policy.is_exact
    assert "store" in allow or plan.store == "same"
    assert "recompute" in allow or (policy.recompute, policy.attention) == ((), "keep")


def whole_network(name: str) -> tuple[nn.Module, Ranking, int]:
    size, options = NETS[name]
    if name == "toy":
        return *toy(), size
    net = timm.create_model(name, num_classes=5, **options).eval()
    shapes = shapes_in_order(net, torch.randn(1, 3, size, size))
    layers = tuple(LayerNorms(layer, shape, (1.0,) * shape.in_channels) for layer, shape in shapes.items())
    return net, Ranking(layers, find_head(net, list(shapes)), 1), size


def least_of(allow: tuple[str, ...], name: str = "vit_tiny_patch16_224") -> int:
    net, ranking, size = whole_network(name)
    with pytest.raises(ValueError, match="smallest workable") as refusal:
        make_plan(ranking, memory=100, model=net, input_shape=(4, 3, size, size), allow=allow, coverage=1.0)
    missing = [way for way in WAYS if way not in allow]
    assert not missing or f"{', '.join(missing)} could be allowed as well" in str(refusal.value)
    return int(re.search(r"memory is (\d+) bytes", str(refusal.value))[1])


def test_what_may_be_given_up_makes_room() -> None:
    nothing, *less = [least_of(allow) for allow in ((), ("recompute",), ("micro_batch",), ("activations",), WAYS)]
    assert least_of(("store",)) <= nothing
    assert all(figure < nothing for figure in less)
    assert less[-1] == min(less)


def test_the_exact_is_given_up_before_the_approximate_and_that_before_the_pool() -> None:
    net, ranking, size = whole_network("vit_tiny_patch16_224")
    options = {"model": net, "input_shape": (4, 3, size, size), "allow": WAYS, "coverage": 1.0}
    roomy = make_plan(ranking, memory="1GiB", **options)
    assert (roomy.policy, roomy.micro_batch) == (Policy(), None)
    least = least_of(WAYS)
    plans = [make_plan(ranking, memory=int(factor * least), **options) for factor in (1.0, 1.4)]
    steps = [(len(plan.pool), plan.policy.is_exact, plan.store == "same") for plan in plans]
    assert steps == sorted(steps)
    assert not plans[0].policy.is_exact or len(plans[0].pool) < len(roomy.pool) or plans[0].policy != Policy()


def test_a_store_is_rounded_no_further_than_the_memory_asks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 2))
    x = torch.randn(2, 2048, 8)  # long, so that stores are what a step consists of
    ranking = rank_layers(net, [(x, None)], lambda y, _: y.square().mean())
    options = {"model": net, "input_shape": x.shape, "loss_fn": lambda y, _: y.square().mean(), "layers": ("2",)}

    def least(**given: object) -> int:
        with pytest.raises(ValueError, match="smallest workable") as refusal:
            make_plan(ranking, memory=100, **options, **given)
        return int(re.search(r"memory is (\d+) bytes", str(refusal.value))[1])

    figures = [least(allow=(), store=store) for store in STORE_BITS]
    assert figures == sorted(figures, reverse=True)
    assert least(allow=("store",)) == figures[-1]
    for memory, store in zip(figures, STORE_BITS, strict=True):
        assert make_plan(ranking, memory=memory, allow=("store",), **options).store == store
    with pytest.raises(ValueError, match="smallest workable"):
        make_plan(ranking, memory=figures[-1], allow=("activations", "recompute"), **options)


def test_dropping_the_earliest_layers_keeps_the_best_first() -> None:
    net, ranking, size = whole_network("mobilenetv2_035")
    options = {"model": net, "input_shape": (4, 3, size, size), "micro_batch": 4, "coverage": 1.0}
    whole = make_plan(ranking, memory="1GiB", **options)
    with pytest.raises(ValueError, match="smallest workable") as refusal:
        make_plan(ranking, memory=100, allow=("frontier",), **options)
    least = int(re.search(r"memory is (\d+) bytes", str(refusal.value))[1])
    plan = make_plan(ranking, memory=least, allow=("frontier",), **options)
    order = list(whole.shapes)
    first = min(order.index(name) for name in plan.pool)
    assert first > min(order.index(name) for name in whole.pool)
    assert plan.pool == tuple(name for name in whole.pool if order.index(name) >= first)


@pytest.mark.parametrize("allow", ["recompute", ("dropout",), ("recompute", "all")])
def test_only_known_ways_can_be_allowed(allow: object) -> None:
    net, ranking = toy()
    with pytest.raises(
        ValueError, match=r"allow .*: wanted some of recompute, micro_batch, store, activations, frontier"
    ):
        make_plan(ranking, memory="1MiB", model=net, input_shape=SHAPE, allow=allow)


def test_a_scheme_takes_no_memory() -> None:
    net, ranking = toy()
    options = {"sampler": "su-random", "layers": {ranking.order()[0]: 1.0}}
    with pytest.raises(ValueError, match="memory: sampler 'su-random' trains its scheme"):
        make_plan(ranking, memory="1MiB", model=net, input_shape=SHAPE, **options)


def test_no_epoch_of_a_whole_network_exceeds_the_memory() -> None:
    torch.manual_seed(0)
    net = timm.create_model("mobilenetv2_035", num_classes=10)
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    layers = tuple(
        LayerNorms(name, shape, (1.0,) * shape.in_channels) for name, shape in shapes_in_order(net, x[:1]).items()
    )
    ranking = Ranking(layers, find_head(net, []), 1)
    plan = make_plan(ranking, memory="5MiB", model=net, input_shape=x.shape)
    totals = measured_totals(net, plan, x, y, epochs=3)
    assert max(totals) <= 5 * 2**20
    assert plan.budget >= 0.1 * plan.pool_cost


def test_the_figure_of_a_refusal_works_and_a_byte_less_does_not() -> None:
    net, ranking = toy()
    least = smallest(net, ranking)
    plan = make_plan(ranking, memory=least, model=net, input_shape=SHAPE)
    assert sum(map(len, plan.sample(0).values())) > 0
    with pytest.raises(ValueError, match=f"is {least} bytes"):
        make_plan(ranking, memory=least - 1, model=net, input_shape=SHAPE)


def test_more_memory_pays_for_more_until_the_whole_pool_is_paid() -> None:
    net, ranking = toy()
    least = smallest(net, ranking, micro_batch=8)
    options = {"model": net, "input_shape": SHAPE, "micro_batch": 8, "coverage": 1.0}
    budgets = [
        make_plan(ranking, memory=memory, **options).budget for memory in (least, least + 16000, least + 60000, 2**24)
    ]
    assert budgets == sorted(budgets)
    assert budgets[0] < budgets[1] < budgets[2]
    assert budgets[3] == make_plan(ranking, memory=2**24, **options).pool_cost


def test_a_budget_fills_most_of_what_the_memory_leaves() -> None:
    net, ranking = toy()
    memory = smallest(net, ranking, micro_batch=8) + 20000
    plan = make_plan(ranking, memory=memory, model=net, input_shape=SHAPE, micro_batch=8, coverage=1.0)
    with fake_copy(net) as twin:
        step = fake_step(twin, SHAPE, target=None, loss_fn=F.cross_entropy, autocast=None, micro_batch=8)
        assert 0.95 * memory < bound(twin, plan, step) <= memory


def test_the_batch_is_split_only_where_it_must_be() -> None:
    net, ranking = toy()
    least = smallest(net, ranking)
    sizes = [
        make_plan(ranking, memory=memory, model=net, input_shape=SHAPE).micro_batch for memory in (least, 4 * least)
    ]
    assert sizes == [1, None]


def test_a_batch_whose_samples_see_each_other_is_never_split() -> None:
    net, ranking = toy()
    policy = Policy(batch_norm="train")
    least = smallest(net, ranking, policy=policy)
    assert least > smallest(net, ranking)
    plan = make_plan(ranking, memory=least, model=net, input_shape=SHAPE, policy=policy)
    assert plan.micro_batch is None


@pytest.mark.parametrize("options", [{"k": 3}, {"layers": ("stem", "tokens")}, {"fill": "skip", "seed": 4}])
def test_options_of_a_plan_hold_for_a_memory_too(options: dict) -> None:
    net, ranking = toy()
    memory = int(1.2 * smallest(net, ranking, **options))
    plan = make_plan(ranking, memory=memory, model=net, input_shape=SHAPE, **options)
    assert len(plan.pool) == options.get("k", len(plan.pool))
    assert plan.pool == options.get("layers", plan.pool)
    assert (plan.fill, plan.seed) == (options.get("fill", "stop"), options.get("seed", 0))
    x, y = toy_batches(size=8, dtype=torch.float32)[0]
    assert max(measured_totals(net, plan, x, y, epochs=4)) <= memory


def test_the_bound_holds_for_a_draw_that_spends_all_on_one_layer() -> None:
    net, ranking = toy()
    plan = make_plan(ranking, budget="8KiB", batch_size=8, coverage=1.0)
    with fake_copy(net) as twin:
        step = fake_step(twin, SHAPE, target=None, loss_fn=F.cross_entropy, autocast=None, micro_batch=None)
        limit = bound(twin, plan, step)
    apply_plan(net, plan)
    x, y = torch.randn(SHAPE), torch.arange(8) % 5
    for name in plan.pool:
        optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
        most = min(plan.shapes[name].in_channels, plan.budget // plan.cost.channel_cost(plan.shapes[name]))
        optimizer._install(0, {layer: range(most if layer == name else 0) for layer in plan.pool})
        assert measure(net, optimizer, x, y).total_bytes <= limit


def test_a_plan_for_a_memory_survives_its_file(tmp_path) -> None:
    net, ranking = toy()
    plan = make_plan(ranking, memory="1MiB", model=net, input_shape=SHAPE)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.memory == 2**20
    assert replace(plan, micro_batch=3).fingerprint != plan.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "wanted one of them"),
        ({"budget": 100, "memory": 100}, "wanted one of them"),
        ({"memory": "1MiB"}, "wanted model and input_shape"),
        ({"memory": "1MiB", "model": nn.Linear(1, 1)}, "wanted model and input_shape"),
    ],
)
def test_a_plan_needs_a_budget_or_a_memory_with_the_model(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(toy()[1], **options)


@pytest.mark.parametrize("memory", ["much", -1, 0, 1.5, True])
def test_a_memory_is_bytes(memory: object) -> None:
    net, ranking = toy()
    with pytest.raises(ValueError, match=r"memory .*: wanted bytes"):
        make_plan(ranking, memory=memory, model=net, input_shape=SHAPE)


@pytest.mark.parametrize("micro_batch", [0, -2, True])
def test_a_micro_batch_is_a_count_of_samples(micro_batch: object) -> None:
    net, ranking = toy()
    with pytest.raises(ValueError, match=r"micro_batch .*: wanted None or an integer"):
        make_plan(ranking, memory="1MiB", model=net, input_shape=SHAPE, micro_batch=micro_batch)


def test_a_memory_needs_exact_costs() -> None:
    net, ranking = toy()
    with pytest.raises(ValueError, match="exact costs"):
        make_plan(ranking, memory="1MiB", model=net, input_shape=SHAPE, cost_model="paper")
