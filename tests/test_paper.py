"""The paper's numbers: what our accounting and our draw give for its networks, budgets and order of layers."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from trady_triton import Ranking, TraDyOptimizer, apply_plan, ledger, make_plan, measure, rank_layers
from trady_triton.bench import paper_setting
from trady_triton.bench.paper_setting import FIGURE_9, added_bytes, paper_plan
from trady_triton.meters import FlopsByKind
from trady_triton.models import ranking_for

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def ranked(name: str) -> Ranking:
    net = timm.create_model(name, num_classes=10)
    return rank_layers(net, [(torch.randn(1, 3, 128, 128), torch.tensor([0]))], F.cross_entropy)


@pytest.fixture(scope="module", name="paper_ranking")
def ranking_of_figure_9() -> Ranking:
    return paper_setting.paper_ranking()


@pytest.mark.parametrize(
    ("name", "layers", "total"),
    [("mobilenetv2_w035", 52, 1252320), ("mcunet_in1", 42, 1309808), ("proxylessnas_w03", 61, 1162032)],
)
def test_elements_of_the_three_networks(name, layers, total):
    plan = make_plan(ranked(name), budget=27946)
    assert len(plan.shapes) == layers
    assert plan.total_elements == total


def test_the_rgn_of_our_costs_gives_the_papers_order_and_its_35_layers(paper_ranking):
    plan = paper_plan(paper_ranking, 27946)
    index = {name: i for i, name in enumerate(plan.shapes)}
    assert [index[name] for name in plan.pool] == FIGURE_9["order"][:35]


def test_pool_memory_and_the_shares_of_the_budgets(paper_ranking):
    plan = paper_plan(paper_ranking, 27946, k=35)
    assert plan.pool_cost == 546608
    shares = [budget / plan.pool_cost for budget in (27946, 66592, 93696)]
    assert shares == pytest.approx([0.051, 0.122, 0.171], abs=5e-4)


def test_savings_of_the_uniform_draw_over_300_epochs(paper_ranking):
    savings = paper_plan(paper_ranking, 27946, k=35).expected(300)
    assert savings.weight_saving == pytest.approx(0.952, abs=0.003)
    assert savings.activation_saving == pytest.approx(0.985, abs=0.001)
    assert savings.wgrad_flops_saving == pytest.approx(0.974, abs=0.002)
    assert savings.channels == pytest.approx(268, abs=3)


def test_half_of_the_channels_in_the_pool_are_depthwise(paper_ranking):
    plan = paper_plan(paper_ranking, 27946, k=35)
    depthwise = sum(plan.shapes[name].in_channels for name in plan.pool if plan.shapes[name].is_depthwise)
    assert (depthwise, sum(plan.shapes[name].in_channels for name in plan.pool)) == (2352, 5248)


def test_the_backward_of_a_real_network_stops_at_the_drawn_depth():
    net = timm.create_model("mobilenetv2_w035", num_classes=10, norm_layer=torch.nn.Identity, feature_mix=False)
    plan = make_plan(ranking_for(net, 128), budget=27946, dgrad_budget=0.3)
    full = plan.dgrad_flops_above("stem")
    assert plan.expected(300).dgrad_flops == pytest.approx(0.3 * full, rel=0.1)
    optimizer = TraDyOptimizer(apply_plan(net, plan).parameters(), plan)
    x, y = torch.randn(2, 3, 128, 128), torch.tensor([1, 2])
    head = 2 * net.fc.weight.numel() * len(y)  # dX of the head, which no plan counts
    seen = set()
    for epoch in range(6):
        drawn = optimizer.resample(epoch)
        lowest = next(name for name in plan.shapes if drawn[name])
        with FlopsByKind(net) as flops:
            F.cross_entropy(net(x), y).backward()
        assert flops.dgrad_flops == len(y) * plan.dgrad_flops_above(lowest) + head
        seen.add(lowest)
        optimizer.zero_grad()
    assert len(seen) > 2


def test_what_training_adds_over_inference_in_the_papers_setting_stays_below_256_kib(paper_ranking):
    net = timm.create_model("mobilenetv2_w035", num_classes=10)
    plan = paper_plan(paper_ranking, 27946)
    for epoch in range(5):
        books = ledger(net, plan, (1, 3, 128, 128), epoch=epoch)
        added = books.kept_bytes + books.compact_gradient_bytes + books.whole_gradient_bytes + books.draw_bytes
        assert added == sum(added_bytes(books).values()) < 256 * 1024
        # A training step peaks where inference does: what is added lives while the working set is small.
        assert books.peak_bytes <= books.inference_bytes + books.draw_bytes
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan)
    optimizer.resample(epoch)
    assert measure(net, optimizer, torch.randn(1, 3, 128, 128), torch.zeros(1, dtype=torch.int64)) == books


def test_the_counts_of_the_papers_setting_are_those_of_this_version():
    row = json.loads((RESULTS / "paper_setting.json").read_text())["cases"][paper_setting.NET]
    counted = paper_setting.count()
    assert {key: row[key] for key in counted} == counted
