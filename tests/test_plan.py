"""Plans: the pool, the budget, the paper's numbers, files and mistakes."""

import dataclasses
import json

import pytest
import torch
from toys import toy_net, toy_plan, toy_ranking

from trady_triton import Plan, Policy, Ranking, make_plan
from trady_triton.budget import parse_budget
from trady_triton.cost import CostModel, LayerShape
from trady_triton.ranking import LayerNorms


def ranking_of(rgn: dict[str, float]) -> Ranking:
    """Layers of one channel that costs 10 elements, with the given RGN."""
    shape = LayerShape(1, 1, 9, 9, 9, kernel_size=(1, 1))
    return Ranking(tuple(LayerNorms(name, shape, (10 * value,)) for name, value in rgn.items()), ("head",), 1)


def test_pool_is_the_shortest_prefix_that_holds_the_coverage():
    ranking = ranking_of({"a": 1, "b": 5, "c": 3, "d": 1})
    assert make_plan(ranking, budget=10, coverage=0.5).pool == ("b",)
    assert make_plan(ranking, budget=10, coverage=0.51).pool == ("b", "c")
    assert make_plan(ranking, budget=10, coverage=1.0).pool == ("b", "c", "a", "d")
    assert make_plan(ranking, budget=10, coverage=0.5, sampler="d-full").pool == ("b",)
    assert make_plan(ranking_of({"a": 97.5, "b": 2.5}), budget=10).pool == ("a", "b")
    assert make_plan(ranking_of({"a": 97.7, "b": 2.3}), budget=10).pool == ("a",)


def test_pool_by_number_and_by_name():
    ranking = ranking_of({"a": 1, "b": 5, "c": 3, "d": 1})
    assert make_plan(ranking, budget=10, k=2).pool == ("b", "c")
    assert make_plan(ranking, budget=10, k=4).pool == ("b", "c", "a", "d")
    assert make_plan(ranking, budget=10, layers=["d", "a"]).pool == ("d", "a")


def test_layers_are_ranked_by_the_cost_of_the_training_itself():
    """Large inputs are dear at a large batch: the order may turn with the batch size."""
    wide = LayerNorms("wide", LayerShape(1, 1000, 10, 10, 10), (1010.0,))
    tall = LayerNorms("tall", LayerShape(1, 10, 100, 100, 100), (200.0,))
    ranking = Ranking((wide, tall), (), 1)
    assert make_plan(ranking, budget="1MiB", k=1, batch_size=1).pool == ("tall",)
    assert make_plan(ranking, budget="1MiB", k=1, batch_size=64).pool == ("wide",)


def test_budget_strings_count_bytes_at_the_batch_and_dtypes():
    plan = toy_plan(toy_net(), "96KiB", batch_size=8, dtype=torch.float32, activation_dtype=torch.bfloat16)
    assert plan.budget == 96 * 1024
    assert plan.cost == CostModel(8, 4, 2, unit="bytes")
    assert 0 < plan.used(plan.sample(0)) <= plan.budget
    plan = toy_plan(toy_net(), "96KiB", dtype=torch.bfloat16, optimizer="adamw")  # states are float32 all the same
    assert plan.cost == CostModel(1, 2, 2, unit="bytes", states=2, state_itemsize=4)


def test_integer_budgets_count_elements_of_one_sample_whatever_the_batch():
    assert toy_plan(toy_net(), 1200, batch_size=8).cost == CostModel()
    assert toy_plan(toy_net(), 1200, optimizer="momentum").cost == CostModel(states=1)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("256KiB", 2**18), ("2 MiB", 2**21), ("1gib", 2**30), ("1.5kb", 1500), ("2MB", 2e6), ("1GB", 1e9), ("12B", 12)],
)
def test_budget_units(text, amount):
    assert parse_budget(text) == (amount, True)
    assert parse_budget(1) == (1, False)


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "", "12", "-1KiB", "0MB", "1TiB", "1iB", "a MiB", None])
def test_bad_budgets_are_refused(wrong):
    with pytest.raises(ValueError, match="budget"):
        parse_budget(wrong)


def test_a_budget_too_small_says_what_would_do():
    plan = toy_plan(toy_net())
    least = min(plan.cost.channel_cost(shape) for shape in plan.shapes.values())
    with pytest.raises(ValueError, match=f"smallest workable budget is {least} elements"):
        toy_plan(toy_net(), least - 1)
    assert sum(len(ids) for ids in toy_plan(toy_net(), least).sample(0).values()) == 1
    stem = plan.cost.channel_cost(plan.shapes["stem"])
    with pytest.raises(ValueError, match=f"smallest workable budget is {stem} elements, one channel of layer 'stem'"):
        toy_plan(toy_net(), least, layers=["stem"])


def test_layers_that_no_channel_fits_take_no_part():
    dear = LayerNorms("dear", LayerShape(1, 1000, 10, 10, 10), (1e6,))
    ranking = Ranking((dear, *ranking_of({"a": 3, "b": 1}).layers), (), 1)
    assert make_plan(ranking, budget=999, coverage=0.7).pool == ("a",)
    assert make_plan(ranking, budget=1010, coverage=0.7).pool == ("dear",)
    with pytest.raises(ValueError, match=r"k 3: .*2 layers"):
        make_plan(ranking, budget=999, k=3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"coverage": 0},
        {"coverage": 1.1},
        {"k": 0},
        {"k": 6},
        {"k": 1.5},
        {"k": True},
        {"layers": ["stme"]},
        {"layers": []},
        {"layers": ["stem", "stem"]},
        {"fill": "most"},
        {"seed": 0.5},
        {"seed": True},
        {"optimizer": "lion"},
        {"cost_model": "guess"},
    ],
    ids=str,
)
def test_bad_options_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_plan(toy_ranking(toy_net()), budget=1200, **wrong)


@pytest.mark.parametrize("wrong", [{"policy": "exact"}, {"dtype": "float32"}, {"activation_dtype": 2}], ids=str)
def test_options_of_another_type_are_named(wrong):
    with pytest.raises(TypeError, match=next(iter(wrong))):
        toy_plan(toy_net(), **wrong)


def test_options_that_exclude_each_other_are_refused():
    for pair in ({"k": 2, "coverage": 0.5}, {"k": 1, "layers": ["stem"]}, {"coverage": 0.5, "layers": ["stem"]}):
        with pytest.raises(ValueError, match=r"wanted one of them"):
            make_plan(toy_ranking(toy_net()), budget=1200, **pair)
    with pytest.raises(ValueError, match="batch_size 4: with a memory"):
        make_plan(toy_ranking(toy_net()), memory="1MiB", model=toy_net(), input_shape=(1, 3, 12, 12), batch_size=4)


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True])
def test_savings_of_no_epochs_are_refused(epochs):
    with pytest.raises(ValueError, match="epochs"):
        toy_plan(toy_net()).expected(epochs)


@pytest.mark.parametrize("epoch", [-1, 1.0, True, "0"])
def test_a_bad_epoch_is_refused(epoch):
    with pytest.raises(ValueError, match="epoch"):
        toy_plan(toy_net()).sample(epoch)


def test_plan_is_frozen_and_survives_its_file(tmp_path):
    in_bytes = toy_plan(toy_net(), "96KiB", batch_size=8, train_bias=True, policy=Policy(batch_norm="affine"))
    for plan in (in_bytes, toy_plan(toy_net(), None, sampler="su", layers={"stem": 0.5, "pointwise": 0.25})):
        plan.save(tmp_path / "plan.json")
        loaded = Plan.load(tmp_path / "plan.json")
        assert loaded == plan
        assert loaded.fingerprint == plan.fingerprint
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.budget = 1


def test_fingerprints_differ_where_plans_differ():
    net = toy_net()
    plans = [toy_plan(net), toy_plan(net, seed=1), toy_plan(net, 1300), toy_plan(net, fill="skip"), toy_plan(net, k=2)]
    assert len({plan.fingerprint for plan in plans}) == len(plans)


def test_damaged_and_foreign_plan_files_are_refused(tmp_path):
    toy_ranking(toy_net()).save(tmp_path / "ranking.json")
    with pytest.raises(ValueError, match=r"wanted a file of format 'trady_triton\.plan'"):
        Plan.load(tmp_path / "ranking.json")
    toy_plan(toy_net()).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    for change in (
        {"cost": None},
        {"budget": 1.5},
        {"budget": True},
        {"budget": -4},
        {"pool": ["nowhere"]},
        {"surprise": 1},
    ):
        (tmp_path / "plan.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match="damaged"):
            Plan.load(tmp_path / "plan.json")


def test_expected_savings_are_the_means_of_the_draws():
    plan = toy_plan(toy_net())
    savings = plan.expected(20)
    draws = [plan.sample(epoch) for epoch in range(20)]
    weights = sum(len(ids) * plan.shapes[n].channel_weights for draw in draws for n, ids in draw.items())
    total = sum(shape.weights for shape in plan.shapes.values())
    assert savings.weight_saving == pytest.approx(1 - weights / 20 / total)
    inputs = sum(len(ids) * plan.shapes[n].in_positions for draw in draws for n, ids in draw.items())
    total = sum(shape.inputs for shape in plan.shapes.values())
    assert savings.activation_saving == pytest.approx(1 - inputs / 20 / total)
    assert savings.wgrad_flops_saving == pytest.approx(1 - savings.wgrad_flops / savings.forward_flops)
    assert savings.channels == pytest.approx(sum(len(ids) for draw in draws for ids in draw.values()) / 20)
    assert savings.used == pytest.approx(sum(plan.used(draw) for draw in draws) / 20)
    assert plan.expected(1).used == plan.used(draws[0])


def test_a_sampler_by_name_is_drawn_from_its_own_pool():
    net = toy_net()
    static, dynamic = toy_plan(net, 100, coverage=0.5, sampler="s-topk"), toy_plan(net, 100, coverage=0.5)
    assert static.sample(7) == dynamic.sample(0) != dynamic.sample(7)
    everything = toy_plan(net, 10**6, coverage=None, sampler="d-full")
    assert len(everything.pool) == len(everything.shapes) == 5
    whole = toy_plan(net, None, coverage=None, sampler="full")
    assert whole.used(whole.sample(3)) == whole.budget == whole.pool_cost
    assert (whole.train_bias, whole.train_norm) == (True, True)
    head = toy_plan(net, None, coverage=None, sampler="head")
    assert head.sample(0) == {}
    assert head.expected().dgrad_flops == 0
    by_neurons = toy_plan(net, 1200, coverage=None, sampler="velocity")
    assert by_neurons.used(by_neurons.sample(0)) == by_neurons.sample(0).charged


def test_lara_pool_is_the_smallest_that_costs_five_budgets():
    ranking = ranking_of({"a": 1, "b": 5, "c": 3, "d": 1})  # of 10 each
    assert make_plan(ranking, budget=10, sampler="medyate").pool == ("b", "c", "a", "d")
    assert make_plan(ranking, budget=10, sampler="medyate", coverage=0.5).pool == ("b",)
    assert len(make_plan(ranking_of(dict.fromkeys("abcdef", 1.0)), budget=10, sampler="medyate").pool) == 5
    cheap = Ranking(tuple(LayerNorms(n, LayerShape(2, 1, 9, 9, 9, kernel_size=(1, 1)), (3.0, 4.0 + i))
                          for i, n in enumerate("abcd")), (), 1)  # fmt: skip
    assert cheap.layers[0].lara(CostModel()) == pytest.approx(5 / 20)
    assert make_plan(cheap, budget=10, sampler="medyate").pool == ("d", "c", "b")  # 10 / 60 <= 0.2 < 10 / 40
    narrow = LayerNorms("narrow", LayerShape(1, 1, 9, 9, 9, kernel_size=(1, 1)), (3.0,))  # RGN and LaRa 3 / 10
    wide = LayerNorms("wide", LayerShape(4, 1, 9, 9, 9, kernel_size=(1, 1)), (1.0,) * 4)  # RGN 4 / 10, LaRa 2 / 40
    mixed = Ranking((wide, narrow), (), 1)
    assert make_plan(mixed, budget=10, coverage=1.0).pool == ("wide", "narrow")
    assert make_plan(mixed, budget=10, sampler="medyate").pool == ("narrow", "wide")


def test_a_scheme_brings_its_own_budget():
    scheme = {"sampler": "su", "layers": {"stem": 1.0, "pointwise": 0.25}}
    plan = toy_plan(toy_net(), None, coverage=None, **scheme)
    assert plan.budget == sum(n * plan.cost.channel_cost(plan.shapes[x]) for x, n in (("stem", 3), ("pointwise", 3)))
    scores = {name: torch.arange(plan.shapes[name].in_channels) for name in plan.pool}
    assert plan.sample(9, scores) == {"stem": (0, 1, 2), "pointwise": (9, 10, 11)}
    for more in (0, 5):
        assert toy_plan(toy_net(), plan.budget + more, **scheme).budget == plan.budget + more
    with pytest.raises(ValueError, match="the scheme of `layers` takes"):
        toy_plan(toy_net(), plan.budget - 1, **scheme)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "lora"}, "wanted one of trady"),
        ({"sampler": "full"}, "takes none"),
        ({"budget": None}, "budget None and memory None: wanted one of them for sampler 'trady'"),
        ({"sampler": "cyclic", "fill": "skip"}, "sampler 'cyclic' has a rule of its own"),
        ({"sampler": "su"}, "su_layers"),
        ({"sampler": "su", "layers": {"stem": 0.5, "pointwise": 2.0}}, "su_layers"),
        ({"sampler": "su", "layers": {"stem": 0}}, "su_layers"),
        ({"sampler": "cyclic", "dgrad_budget": 0.5}, "dgrad_budget: the inclusion probabilities"),
        ({"sampler": "d-rgn", "correction_cap": 2.0}, "correction_cap: the inclusion probabilities"),
        ({"correction_cap": 0.0}, "correction_cap"),
        ({"dgrad_budget": 0}, "dgrad_budget"),
        ({"dgrad_budget": 1.5}, "dgrad_budget"),
        ({"dgrad_budget": True}, "dgrad_budget"),
        ({"dgrad_budget": 0.99, "layers": ["stem"]}, "the shallowest layer of the pool takes 1.0000 of full dX"),
        ({"dgrad_budget": 0.5, "train_bias": True}, "biases"),
        ({"dgrad_budget": 0.5, "train_norm": True}, "norms"),
        ({"dgrad_budget": 0.5, "policy": Policy(batch_norm="affine")}, "norms"),
    ],
    ids=str,
)
def test_samplers_refuse_what_they_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        toy_plan(toy_net(), **{"coverage": None, **options})


def test_depths_above_which_the_budget_can_be_spent():
    """Channels and costs: stem 3 of 216, depthwise 8 of 54, grouped 16 of 63, pointwise 12 of 19, tokens 10 of 18."""

    def depths(budget, share, **options):
        return list(toy_plan(toy_net(), budget, dgrad_budget=share, **options).depths)

    names = ["stem", "depthwise", "grouped", "pointwise", "tokens"]
    assert depths(408, 0.6) == names[:4]  # 12 * 19 + 10 * 18
    assert depths(409, 0.6) == names[:3]
    assert depths(409, 0.05) == names  # the dX of grouped alone takes more
    assert depths(10**6, 1.0) == names
    assert depths(1200, 0.6, layers=["tokens", "grouped"]) == ["grouped", "tokens"]
    assert depths(1188, 0.6, layers=["tokens", "grouped"]) == ["grouped"]
    assert depths(300, 1.0, layers=["stem"]) == ["stem"]


def test_a_depth_budget_is_kept_on_average_and_reaches_every_layer():
    plan = toy_plan(toy_net(), 400, dgrad_budget=0.3)
    full = plan.dgrad_flops_above("stem")
    assert sum(plan.depths.values()) == pytest.approx(1)
    mean = sum(p * plan.dgrad_flops_above(name) for name, p in plan.depths.items())
    assert mean == pytest.approx(0.3 * full)  # an even draw would take 0.47
    savings, epochs = plan.expected(2000), 2000
    assert savings.dgrad_flops <= 0.3 * full * (1 + 4 / epochs**0.5)
    assert savings.dgrad_flops_saving == pytest.approx(1 - savings.dgrad_flops / full)
    counts = dict.fromkeys(plan.pool, 0)
    for epoch in range(epochs):
        drawn = plan.sample(epoch)
        assert plan.used(drawn) <= plan.budget
        depth = plan.draw_depth(epoch)
        assert all(list(plan.shapes).index(name) >= list(plan.shapes).index(depth) for name in drawn)
        for name, ids in drawn.items():
            counts[name] += len(ids)
    for name, chances in plan.inclusion().items():
        assert counts[name] / epochs == pytest.approx(sum(chances), rel=0.25), name  # a pool of 5 layers is not normal


def test_the_correction_evens_out_unequal_chances_up_to_its_cap():
    plan = toy_plan(toy_net(), 400, dgrad_budget=0.6, correction_cap=1.5)
    chances = plan.inclusion()
    mean = sum(map(sum, chances.values())) / sum(map(len, chances.values()))
    for epoch in range(5):
        drawn = plan.sample(epoch)
        for name, ids in drawn.items():
            wanted = [min(1.5, mean / chances[name][channel]) for channel in ids]
            assert list(drawn.scale[name]) == pytest.approx(wanted)
    assert toy_plan(toy_net(), sampler="weighted").correction_cap == 4.0
    assert toy_plan(toy_net(), sampler="weighted", correction_cap=0.5).correction_cap == 0.5
    whole = toy_plan(toy_net(), 10**6)
    assert whole.inclusion() == {name: (1.0,) * whole.shapes[name].in_channels for name in whole.pool}
    with pytest.raises(ValueError, match="sampler 'cyclic': its inclusion probabilities are not known"):
        toy_plan(toy_net(), sampler="cyclic").inclusion()
    with pytest.raises(ValueError, match=r"scores: layer .* is missing"):
        whole.inclusion({})


def test_step_flops_are_known_before_training():
    plan = toy_plan(toy_net(), 1200)
    savings = plan.expected(10)
    assert savings.forward_flops == sum(shape.dense_flops for shape in plan.shapes.values())
    wgrad = sum(len(ids) * plan.shapes[n].channel_wgrad_flops for e in range(10) for n, ids in plan.sample(e).items())
    assert savings.wgrad_flops == pytest.approx(wgrad / 10)
    assert savings.step_flops == savings.forward_flops + savings.dgrad_flops + savings.wgrad_flops
    assert toy_plan(toy_net(), 20, train_bias=True).expected(1).dgrad_flops == plan.dgrad_flops_above("stem")


def test_a_correction_that_cannot_be_had_is_refused_before_training():
    with pytest.raises(ValueError, match="fill 'skip'"):
        toy_plan(toy_net(), fill="skip", correction_cap=2.0)


def test_k_and_coverage_hold_without_a_budget_too():
    ranking = toy_ranking(toy_net())
    assert make_plan(ranking, budget=None, sampler="full").pool == ranking.order()
    assert make_plan(ranking, budget=None, sampler="full", k=2).pool == ranking.order()[:2]
    with pytest.raises(ValueError, match="coverage"):
        make_plan(ranking, budget=None, sampler="full", coverage=2.0)


@pytest.mark.parametrize(
    ("sampler", "layers", "source"),
    [("d-rgn", None, "gradient_scores"), ("tinytrain", None, "fisher_scores"), ("su", {"stem": 0.5}, "pretrained")],
)
def test_samplers_that_need_scores_say_so_and_from_where(sampler, layers, source):
    plan = toy_plan(toy_net(), coverage=None, sampler=sampler, layers=layers)
    for call in (plan.expected, lambda: plan.sample(0)):
        with pytest.raises(ValueError, match=f"sampler '{sampler}': wanted scores.*{source}"):
            call()


def test_bad_scores_are_named():
    plan, by_neurons = (toy_plan(toy_net(), sampler=sampler) for sampler in ("d-rgn", "velocity"))
    inputs = {name: torch.ones(shape.in_channels) for name, shape in plan.shapes.items()}
    outputs = {name: torch.ones(shape.out_channels) for name, shape in plan.shapes.items()}
    for accepting, scores, others in ((plan, inputs, outputs), (by_neurons, outputs, inputs)):
        assert accepting.sample(0, scores)
        with pytest.raises(ValueError, match=r"scores: layer 'stem' is missing"):
            accepting.sample(0, {name: values for name, values in scores.items() if name != "stem"})
        with pytest.raises(ValueError, match=r"scores of layer 'tokens': shape \(\d+,\), wanted \(\d+,\)"):
            accepting.sample(0, others)
