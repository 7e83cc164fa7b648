"""The study: tables from recordings and results, the page that they fill, plots that can be opened."""

import json
import math

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from trady_triton import rank_layers
from trady_triton.app.cell import network, resident
from trady_triton.app.cli import app
from trady_triton.app.experiment import read_csv, write_csv
from trady_triton.app.recording import Recording, record_run
from trady_triton.app.spec import DataSet, Net
from trady_triton.app.study import (
    Run,
    channel_table,
    comparison_table,
    layer_table,
    net_table,
    strategy_table,
    tail_table,
)
from trady_triton.app.study_report import TABLES, refresh
from trady_triton.models import ranking_for
from trady_triton.ranking import LayerNorms, Ranking, channel_norms

SPEC = """
nets: [{name: mobilenetv2_w035, image_size: 32}]
data: [{file: digits, train_per_class: 2, test_per_class: 1}]
budgets: [4000]
strategies: [trady, cyclic, head, d-rgn, su]
lrs: [0.01]
seeds: [0, 1]
protocol: {epochs: 2, batch_size: 10, max_grad_norm: 2.0}
"""


def result(strategy, budget, seed, accuracy, **more):
    row = {"net": "n", "data": "d", "budget": budget, "strategy": strategy, "lr": "0.1", "seed": seed,
           "accuracy": accuracy, "kept_bytes": "1048576", "peak_bytes": "1", "forward_flops": "1", "dgrad_flops": "2e9",
           "wgrad_flops": "1", "probed_batches": "0", "seconds": "9"}  # fmt: skip
    return row | more


RESULTS = [
    *(result("trady", "10", str(seed), str(0.5 + 0.1 * seed)) for seed in range(3)),
    *(result("trady", "20", str(seed), str(0.6 + 0.1 * seed)) for seed in range(3)),
    *(result("head", "", str(seed), str(0.4 + 0.05 * seed)) for seed in range(3)),
    result("full", "", "0", ""),
]


def recording(ranking: Ranking) -> Recording:
    names = [layer.name for layer in ranking.layers]
    return Recording(ranking, {n: [1.0] for n in names}, [1.5], {n: [1.4] for n in names}, [0.5])


@pytest.fixture(scope="module")
def runs():
    """Three runs of which the first two agree but for a factor, and the third has every layer's channels reversed."""
    net = network(Net("mobilenetv2_w035", image_size=32), "", 4)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([0, 1])
    base = rank_layers(net, [(x, y)], torch.nn.functional.cross_entropy)
    twice = [LayerNorms(x.name, x.shape, tuple(2 * n for n in x.norms)) for x in base.layers]
    turned = [LayerNorms(x.name, x.shape, x.norms[::-1]) for x in base.layers]
    rankings = base, Ranking(tuple(twice), base.head, 1), Ranking(tuple(turned), base.head, 1)
    return [Run("n", data, i, recording(r)) for i, (data, r) in enumerate(zip("aab", rankings, strict=True))]


def test_layers_rank_alike_and_channels_do_not(runs):
    layers, channels = layer_table(runs), channel_table(runs)
    assert [row["spearman"] for row in layers] == pytest.approx([1, 1, 1])
    assert [row["spearman_rgn"] for row in layers] == pytest.approx([1, 1, 1])
    assert channels[0]["spearman_inside"] == pytest.approx(1)
    assert abs(channels[1]["spearman_inside"]) < 0.5
    assert channels[1]["t_test_p"] == pytest.approx(1)  # the same norms in another order: the t-test sees nothing
    assert channels[0]["t_test_p"] < 0.01  # and here it sees a factor of 2, which changes no rank
    assert [(row["net"], row["seed"]) for row in net_table(runs)] == [("n", 0)]
    assert tail_table(runs)[0] == {"net": "n", "data": "a", "seed": 0, "epoch": 0, "alpha": 1.5, "layers_min": 1.4,
                                   "layers_median": 1.4, "layers_max": 1.4}  # fmt: skip


def test_strategies_are_compared_under_equal_conditions():
    rows = {(row["strategy"], row["budget"]): row for row in strategy_table(RESULTS)}
    assert rows["trady", "10"]["accuracy"] == pytest.approx(0.6)
    assert rows["trady", "10"]["std"] == pytest.approx(0.1)
    assert (rows["full", ""]["diverged"], math.isnan(rows["full", ""]["accuracy"])) == (1, True)
    (one, other) = comparison_table(RESULTS)
    assert (one["strategy"], one["other"], one["pairs"], one["wins"]) == ("trady", "head", 6, 6)
    assert one["difference"] == pytest.approx(0.2)  # of 0.10 0.15 0.20 and 0.20 0.25 0.30
    assert one["p_better"] == pytest.approx(1 - other["p_better"])
    assert one["t"] == pytest.approx(0.2 / (math.sqrt(0.025 / 5) / math.sqrt(6)))


def test_a_recording_adds_up_the_norms_of_every_step():
    net, data = Net("mobilenetv2_w035", image_size=32), DataSet("digits", 2, 1)
    images = resident(net, data, "", torch.device("cpu"))
    torch.manual_seed(0)
    model = network(net, "", 10).eval()
    made = record_run(model, images, epochs=1, batch_size=20, lr=0.0, max_grad_norm=None, seed=0)
    x, y = next(images.train_batches(20, 0, 0))
    model.zero_grad()
    model.train()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    by_name = {layer.name: layer for layer in made.ranking.layers}
    for name in ("stem", "blocks.3.dw", "feature_mix"):
        layer = model.get_submodule(name)
        wanted = channel_norms(layer.weight.grad, layer.groups).tolist()
        assert by_name[name].norms == pytest.approx(wanted, rel=1e-4)
        assert made.epochs[name] == pytest.approx([sum(wanted)], rel=1e-4)
    assert made.ranking.steps == 1
    assert len(made.alpha) == len(made.accuracy) == 1


def test_the_page_is_filled_from_the_tables(tmp_path):
    write_csv(tmp_path / "strategies.csv", strategy_table(RESULTS))
    write_csv(tmp_path / "comparisons.csv", comparison_table(RESULTS))
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- study:strategies -->\nold\n<!-- /study -->\nb\n<!-- study:tails -->\nkept\n<!-- /study -->\n"
    )
    refresh(page, tmp_path)
    text = page.read_text()
    assert "old" not in text
    assert "kept" in text  # there is no tails.csv
    assert "| trady | 10 | 0.1 | 3 | 60.00 (10.00) | 1.00 | 2.000 |" in text
    refresh(page, tmp_path)
    assert page.read_text() == text
    page.write_text("<!-- study:nothing -->\n<!-- /study -->\n")
    with pytest.raises(ValueError, match="study:nothing"):
        refresh(page, tmp_path)


def test_the_command_records_and_writes_everything(tmp_path):
    (tmp_path / "spec.yaml").write_text(SPEC)
    write_csv(tmp_path / "results.csv", RESULTS)
    arguments = ["study", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "out"), "--device", "cpu",
                 "--results", str(tmp_path / "results.csv"), "--ship", str(tmp_path)]  # fmt: skip
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "recorded mobilenetv2_w035-digits-s1" in first.output
    again = CliRunner().invoke(app, arguments)
    assert "recorded" not in again.output
    for name in ("tails", "topology", "coverage", "strategies", "matrix"):
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert image.width > 600
    for file, table in TABLES.values():
        assert table(read_csv(tmp_path / "out" / file.removeprefix("nets/"))).startswith("| ")
    assert "seconds" not in read_csv(tmp_path / "out" / "results.csv")[0]
    shipped = Ranking.from_dict(json.loads((tmp_path / "mobilenetv2_w035.json").read_text()))
    assert shipped.steps == 4
    assert ranking_for(network(Net("mobilenetv2_w035", image_size=32), "", 4), 32) is None


def test_nothing_to_do_is_said(tmp_path):
    done = CliRunner().invoke(app, ["study", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "nothing to do" in done.output
