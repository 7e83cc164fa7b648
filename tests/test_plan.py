"""Plans: the pool, the budget, the paper's numbers, files and mistakes."""

import dataclasses
import json

import pytest
import torch
from toys import toy_net, toy_plan, toy_ranking

from trady_triton import Plan, Ranking, make_plan
from trady_triton.cost import CostModel, LayerShape
from trady_triton.plan import parse_budget
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


def test_pool_by_number_and_by_name():
    ranking = ranking_of({"a": 1, "b": 5, "c": 3, "d": 1})
    assert make_plan(ranking, budget=10, k=2).pool == ("b", "c")
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


def test_integer_budgets_count_elements_of_one_sample_whatever_the_batch():
    assert toy_plan(toy_net(), 1200, batch_size=8).cost == CostModel()


@pytest.mark.parametrize(
    ("text", "amount"), [("256KiB", 262144), ("2 MiB", 2097152), ("1.5kb", 1500), ("1GB", 10**9), ("12B", 12)]
)
def test_budget_units(text, amount):
    assert parse_budget(text) == (amount, True)


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "", "12", "-1KiB", "0MB", "1TiB", "a MiB", None])
def test_bad_budgets_are_refused(wrong):
    with pytest.raises(ValueError, match="budget"):
        parse_budget(wrong)


def test_a_budget_too_small_says_what_would_do():
    plan = toy_plan(toy_net())
    least = min(plan.cost.channel_cost(shape) for shape in plan.shapes.values())
    with pytest.raises(ValueError, match=f"smallest workable budget is {least} elements"):
        toy_plan(toy_net(), least - 1)
    assert sum(len(ids) for ids in toy_plan(toy_net(), least).sample(0).values()) == 1


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
        {"k": True},
        {"layers": ["stme"]},
        {"layers": []},
        {"layers": ["stem", "stem"]},
        {"fill": "most"},
        {"seed": 0.5},
        {"cost_model": "guess"},
    ],
    ids=str,
)
def test_bad_options_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_plan(toy_ranking(toy_net()), budget=1200, **wrong)


@pytest.mark.parametrize("epoch", [-1, 1.0, True, "0"])
def test_a_bad_epoch_is_refused(epoch):
    with pytest.raises(ValueError, match="epoch"):
        toy_plan(toy_net()).sample(epoch)


def test_plan_is_frozen_and_survives_its_file(tmp_path):
    plan = toy_plan(toy_net(), "96KiB", batch_size=8, train_bias=True)
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
    del content["cost"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="damaged"):
        Plan.load(tmp_path / "plan.json")


def test_expected_savings_are_the_means_of_the_draws():
    plan = toy_plan(toy_net())
    savings = plan.expected(20)
    draws = [plan.sample(epoch) for epoch in range(20)]
    weights = sum(len(ids) * plan.shapes[n].channel_weights for draw in draws for n, ids in draw.items())
    total = sum(shape.weights for shape in plan.shapes.values())
    assert savings.weight_saving == pytest.approx(1 - weights / 20 / total)
    assert savings.channels == pytest.approx(sum(len(ids) for draw in draws for ids in draw.values()) / 20)
    assert savings.used == pytest.approx(sum(plan.used(draw) for draw in draws) / 20)
