"""The grid: its cells, what is finished, what a row holds."""

import json
import os
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from trady_triton.app.build import build_model
from trady_triton.app.cell import resident, run_cell
from trady_triton.app.cli import app
from trady_triton.app.experiment import finished, read_csv, run_grid
from trady_triton.app.planning import rank_on_noise
from trady_triton.app.resident import first_of_each
from trady_triton.app.spec import Cell, DataSet, Method, Net, Protocol, Spec

NET: list[Net] = []
DIGITS = DataSet("digits", train_per_class=4, test_per_class=2)
PROTOCOL = Protocol(epochs=2, warmup_epochs=1, batch_size=8, max_grad_norm=2.0)

SPEC = """
nets: [{name: mobilenetv2_w035, image_size: 32}]
data: [{file: digits, train_per_class: 4, test_per_class: 2}]
budgets: [4000, 9000]
strategies: [trady, head, {name: shallow, sampler: trady, dgrad_budget: 0.5}, {name: full, sampler: full, lr: 0.01}]
lrs: [0.1]
seeds: [0, 1]
protocol: {epochs: 1, batch_size: 8}
"""


@pytest.fixture(scope="module", autouse=True)
def ranking(tmp_path_factory):
    """A ranking measured here, at the images' size, which the nets of these tests name."""
    path = tmp_path_factory.mktemp("ranking") / "ranking.json"
    rank_on_noise(build_model("mobilenetv2_w035", num_classes=10, image_size=32), 32, batch_size=2, steps=1).save(path)
    NET.append(Net("mobilenetv2_w035", image_size=32, ranking=str(path)))
    return path


def cell(name="trady", budget=4000, seed=0, **options) -> Cell:
    return Cell(NET[0], DIGITS, budget, Method(name, name, None, options), 0.1, seed, PROTOCOL)


def test_the_grid_is_the_product_and_strategies_without_budget_run_once(tmp_path):
    (tmp_path / "spec.yaml").write_text(SPEC)
    cells = list(Spec.load(tmp_path / "spec.yaml").cells())
    assert [(c.method.name, c.budget, c.lr) for c in cells if c.seed == 0] == [
        ("trady", 4000, 0.1), ("trady", 9000, 0.1), ("head", None, 0.1), ("shallow", 4000, 0.1),
        ("shallow", 9000, 0.1), ("full", None, 0.01),
    ]  # fmt: skip
    assert len({c.key for c in cells}) == len(cells) == 12
    assert replace(cells[0], protocol=PROTOCOL).key != cells[0].key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds: [0, 1]", ""), "Spec: 'seeds' is missing; wanted entries nets, data"),
        (("seeds: [0, 1]", "seeds: 3"), "seeds 3: wanted a list"),
        (("seeds: [0, 1]", "seeds: [a]"), "seed 'a': wanted an integer"),
        (("trady, head", "lora"), "wanted one of trady"),
        (("file: digits", "fiel: digits"), "DataSet: 'fiel' is unknown; wanted entries file"),
        (("budgets: [", "budgets: [lots, "), "budget 'lots'"),
        (("lrs: [", "lrs: [.nan, "), "lr nan: wanted a finite number"),
        (("lrs: [", "lrs: [1e-3, "), "lr '1e-3': wanted a finite number of at least 0; YAML takes 1e-3 for text"),
        (("epochs: 1", "epochs: 1, max_grad_norm: x"), "max_grad_norm 'x': wanted a finite number"),
        (("epochs: 1", "epochs: 1, warmup_epochs: -1"), "warmup_epochs -1: wanted a finite number"),
        (("epochs: 1", "epochs: 1, test_every: -1"), "test_every -1: wanted an integer of at least 0"),
        (("image_size: 32", "image_size: big"), "image_size 'big': wanted an integer of at least 1"),
        (("image_size: 32", "args: 5"), "args 5: wanted a mapping"),
        (("epochs: 1", "epochs: 0"), "epochs 0: wanted an integer of at least 1"),
        (("dgrad_budget", "dgrad"), "strategy 'shallow': make_plan has no option 'dgrad'"),
        (("nets: [", "nets: ]["), "not YAML"),
    ],
)
def test_a_bad_spec_is_refused(tmp_path, change, message):
    (tmp_path / "spec.yaml").write_text(SPEC.replace(*change))
    with pytest.raises(ValueError, match=message):
        Spec.load(tmp_path / "spec.yaml")


def test_sparse_update_needs_a_published_scheme(tmp_path):
    (tmp_path / "spec.yaml").write_text(SPEC.replace("trady, head", "su"))
    with pytest.raises(ValueError, match="no Sparse Update scheme of 4000"):
        list(Spec.load(tmp_path / "spec.yaml").cells())


@pytest.mark.parametrize(
    "name", ["trady", "d-rgn", "s-rgn", "velocity", "neq", "tinytrain", "weighted", "full", "head"]
)
def test_a_cell_gives_a_row_with_what_it_took(name):
    budget = None if name in ("neq", "full", "head") else 4000
    row = run_cell(cell(name, budget), "", "cpu")
    assert 0 <= row["accuracy"] <= 1
    assert row["most_used"] <= row["plan_budget"]
    assert row["forward_flops"] > 0
    assert (row["wgrad_flops"] > row["forward_flops"] * 0.9) == (name in ("full", "neq"))
    assert row["kept_bytes"] > 0
    assert row["probed_batches"] == {"d-rgn": 10, "s-rgn": 5, "velocity": 2, "neq": 2, "tinytrain": 1}.get(name, 0)
    assert row["torch"] == torch.__version__


def test_a_cell_is_a_function_of_its_seed():
    rows = [run_cell(cell(seed=seed), "", "cpu") for seed in (0, 0, 1)]
    assert rows[0]["train_loss"] == rows[1]["train_loss"] != rows[2]["train_loss"]


def test_a_diverged_run_is_a_result():
    row = run_cell(replace(cell("full", None), lr=1e38, protocol=replace(PROTOCOL, max_grad_norm=None)), "", "cpu")
    assert row["accuracy"] is None
    assert "loss is" in row["error"]


def test_finished_cells_are_not_run_again(tmp_path):
    cells = [cell("head", None), cell("head", None, seed=1)]
    seen = []
    rows = run_grid(cells[:1], tmp_path, "", devices=["cpu"], threads=1, on_cell=lambda row, left: seen.append(left))
    assert seen == [0]
    assert finished(cells, tmp_path) == cells[:1]
    (tmp_path / "cells" / f"{cells[1].key}.json.part").write_text("{")  # a killed cell left half a file
    path = tmp_path / "cells" / f"{cells[0].key}.json"
    os.utime(path, (1, 1))
    both = run_grid(cells, tmp_path, "", devices=["cpu"], threads=1, on_cell=lambda row, left: seen.append(left))
    assert seen == [0, 0]
    assert path.stat().st_mtime == 1
    assert both[0] == rows[0]
    assert [row["seed"] for row in read_csv(tmp_path / "results.csv")] == ["0", "1"]


def test_a_cell_that_fails_leaves_the_finished_ones(tmp_path):
    cells = [cell("head", None), replace(cell("head", None), data=DataSet("nowhere.npz"))]
    with pytest.raises(ValueError, match=r"cell mobilenetv2_w035-nowhere-.*: data 'nowhere\.npz': no such file"):
        run_grid(cells, tmp_path, "", devices=["cpu"], threads=1)
    assert finished(cells, tmp_path) == cells[:1]


def test_images_are_decoded_once_and_the_same_for_everybody():
    data = resident(NET[0], DIGITS, "", torch.device("cpu"))
    assert data is resident(NET[0], DIGITS, "", torch.device("cpu"))
    assert (data.train.images.shape, data.train.images.dtype) == ((40, 3, 32, 32), torch.uint8)
    assert data.train.labels.bincount().tolist() == [4] * 10
    epochs = [[y.tolist() for _, y in data.train_batches(8, 0, epoch)] for epoch in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    x, _ = next(data.test_batches())
    assert x.shape == (20, 3, 32, 32)
    assert -1.01 <= float(x.min()) < float(x.max()) <= 1.01
    assert first_of_each((1, 0, 1, 1, 0), 1) == [0, 1]


def test_the_command_runs_a_grid(tmp_path, ranking):
    spec = tmp_path / "tiny.yaml"
    spec.write_text(
        SPEC.replace("trady, head, ", "").replace("{name: shallow, sampler: trady, dgrad_budget: 0.5}, ", "")
        .replace("{name: full, sampler: full, lr: 0.01}", "head").replace("[0, 1]", "[0]")
    )  # fmt: skip
    spec.write_text(spec.read_text().replace("image_size: 32}", f"image_size: 32, ranking: {ranking}}}"))
    result = CliRunner().invoke(app, ["experiment", str(spec), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    rows = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*.json")]
    assert [row["strategy"] for row in rows] == ["head"]
