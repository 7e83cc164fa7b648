"""The pairs of the bars train the same layers, are checked before they are timed, and make one row a net."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from trady_triton.bench import bench_bars
from trady_triton.bench.bench_bars import DRAWS, PAIRS, ROUNDS, WAYS, bars_table, measure
from trady_triton.bench.case import MIN_ROUNDS
from trady_triton.bench.methods import Method
from trady_triton.bench.nets import Net
from trady_triton.bench.readme import filled
from trady_triton.bench.rivals import partial
from trady_triton.bench.training import Setup

NET = Net("mobilenetv2_w035", batch=2, image_size=32)


@pytest.mark.parametrize("way", PAIRS)
def test_the_rival_trains_the_layers_that_are_drawn_whole_and_nothing_else(way: str) -> None:
    model = NET.build()
    setup = Setup(NET, NET.rank(model), ("16KiB",) * 3)
    ours, rival = (WAYS[name].set_up(NET.build(), setup) for name in (way, PAIRS[way]))
    layers = set()
    for epoch in range(2):
        drawn = set(ours.plan.sample(epoch))
        rival.begin(epoch)
        assert rival.trained == {f"{name}.weight" for name in drawn} | {"fc.weight", "fc.bias"}
        assert {name for name, p in rival.model.named_parameters() if p.requires_grad} == rival.trained
        layers |= {frozenset(drawn)}
    assert len(layers) == 2  # another draw, other layers


def test_a_row_holds_both_ratios_and_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bench_bars.run("quick", tmp_path, Console(quiet=True), [NET])
    row = store.rows[NET.name]
    assert row["status"] == "ok", row
    (count,) = {len(row[way]["ms"]) for way in WAYS}
    assert DRAWS * MIN_ROUNDS <= count <= DRAWS * ROUNDS
    assert row["lean"]["kept_bytes"] < row["frozen"]["kept_bytes"]
    text = filled("<!-- bench:bars -->\n<!-- /bench -->", store.path.parent.parent)
    assert "mobilenetv2_w035" not in text  # a quick run is not shown
    cells = bars_table({"cases": store.rows}).splitlines()[-1].split(" | ")
    for cell, way in zip(cells[1:3], PAIRS, strict=True):
        ratios = sorted(a / b for a, b in zip(row[way]["ms"], row[PAIRS[way]]["ms"], strict=True))
        middle = (ratios[(count - 1) // 2] + ratios[count // 2]) / 2
        assert cell == f"{middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    monkeypatch.setattr(bench_bars, "measure", None)  # it is done
    assert bench_bars.run("quick", tmp_path, Console(quiet=True), [NET]).rows == store.rows


def test_a_third_round_is_timed_only_where_two_do_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [1.0, 1.0, 2.0, 1.0, 1.04, 1.0, 2.0, 1.0]
    second = [1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 2.2, 1.0, 1.0, 1.0, 2.1, 1.0]
    clock = iter([*first, *second])
    monkeypatch.setattr(bench_bars, "seconds", lambda training, step: next(clock))
    trainings = dict.fromkeys(WAYS, SimpleNamespace(begin=lambda epoch: None, step=lambda step: None))
    times = bench_bars.timed(trainings, None)
    assert times["lean"] == [1000.0, 1040.0, 1000.0, 1000.0, 1000.0]
    assert times["recomputed"] == [2000.0, 2000.0, 2000.0, 2200.0, 2100.0]


def test_a_red_gate_shows_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model, setup):
        training = partial.drawn_dense(model, setup)
        model.fc.weight.register_hook(lambda grad: 1.01 * grad)
        return training

    monkeypatch.setitem(bench_bars.WAYS, "frozen", Method("wrong", wrong, budget=1))
    row = measure(NET, "16KiB")
    assert row["status"] == "red"
    assert "wrong: gradients err" in row["why"]
    assert "| red: wrong" in bars_table({"cases": {"net": NET.described() | row}})
