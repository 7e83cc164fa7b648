import pytest
import timm
import torch
from rich.console import Console

from trady_triton import make_plan
from trady_triton.app.planning import (
    describe,
    ledgers,
    load_plan,
    load_ranking,
    mean_channels,
    parse_budget_option,
    pick_device,
    rank_on_noise,
)
from trady_triton.app.tables import ledger_table


@pytest.fixture
def ranking(net):
    return rank_on_noise(net, 32)


def test_a_ranking_on_noise_depends_on_the_seed_alone(net, ranking):
    torch.manual_seed(9)
    assert rank_on_noise(net, 32) == ranking
    assert rank_on_noise(net, 32, seed=1) != ranking


def test_a_network_without_a_classifier_can_be_ranked_on_noise():
    net = timm.create_model("test_efficientnet", num_classes=0)
    assert len(rank_on_noise(net, 32).layers) > 5


def test_a_ranking_of_the_same_model_and_size_is_read(net, ranking, tmp_path):
    ranking.save(tmp_path / "r.json")
    assert load_ranking(str(tmp_path / "r.json"), net, 32) == ranking


def test_a_classifier_of_another_size_makes_no_other_model(ranking, tmp_path):
    ranking.save(tmp_path / "r.json")
    net = timm.create_model("test_efficientnet", num_classes=77)
    assert load_ranking(str(tmp_path / "r.json"), net, 32) == ranking


def test_a_ranking_of_another_image_size_is_an_error(net, ranking, tmp_path):
    ranking.save(tmp_path / "r.json")
    with pytest.raises(ValueError, match=r"r\.json: made for another model or image size: layer .* at 64 px"):
        load_ranking(str(tmp_path / "r.json"), net, 64)


def test_a_plan_of_another_model_is_an_error(ranking, tmp_path):
    make_plan(ranking, budget=20000).save(tmp_path / "p.json")
    with pytest.raises(ValueError, match=r"p\.json: made for another model, layer '.*' is only in the"):
        load_plan(str(tmp_path / "p.json"), timm.create_model("test_vit", img_size=32), 32)


def test_the_description_s_numbers_follow_from_the_shapes(ranking):
    plan = make_plan(ranking, budget="20KiB", batch_size=4, cost_model="paper")
    description = describe(plan, "net")
    shapes = [plan.shapes[name] for name in plan.pool]
    depthwise = [1 if s.groups == s.in_channels > 1 else s.channel_weights for s in shapes]
    assert description["pool_elements"] == sum(
        s.in_channels * (weights + s.stored_positions) for s, weights in zip(shapes, depthwise, strict=True)
    )
    assert description["pool_cost"] == 4 * sum(
        s.in_channels * (weights + 4 * s.stored_positions) for s, weights in zip(shapes, depthwise, strict=True)
    )
    assert description["total_elements"] == sum(s.weights + s.inputs for s in plan.shapes.values())
    assert (description["unit"], description["budget"], description["batch_size"]) == ("bytes", 20480, 4)


def test_mean_channels_add_up_to_what_the_plan_expects(ranking):
    plan = make_plan(ranking, budget=3000)
    assert sum(mean_channels(plan).values()) == pytest.approx(plan.expected().channels)


@pytest.mark.parametrize(("text", "budget"), [("27946", 27946), ("-5", -5), ("256KiB", "256KiB"), ("x", "x")])
def test_whole_numbers_are_elements_and_the_rest_is_for_the_plan_to_read(text, budget):
    assert parse_budget_option(text) == budget


def test_an_unknown_device_is_an_error():
    with pytest.raises(ValueError, match="--device 'abacus'"):
        pick_device("abacus")


def test_the_ledgers_of_a_plan_stand_side_by_side(net, ranking):
    plan = make_plan(ranking, budget="8KiB", batch_size=2)
    books = ledgers(net, plan, 32, 2)
    assert books["trady"].kept_bytes < books["full"].kept_bytes
    console = Console(width=120, record=True)
    console.print(ledger_table(books))
    (row,) = [line.split() for line in console.export_text().splitlines() if "kept for the backward" in line]
    wanted = [f"{entry.kept_bytes / 2**20:.3f}" for entry in books.values()]
    assert [row[-4], row[-2]] == wanted
