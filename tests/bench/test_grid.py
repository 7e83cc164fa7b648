"""The cases of every mode: nothing runs twice, what matters most comes first, what is left out says so."""

from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from trady_triton.bench import grid
from trady_triton.bench.config import MODES, settings
from trady_triton.bench.methods import METHODS
from trady_triton.bench.runner import Entry, Runner
from trady_triton.bench.store import Store


def ran(monkeypatch: pytest.MonkeyPatch, out: Path, parts: tuple[str, ...]) -> tuple[list[Entry], dict[str, Store]]:
    """What a runner is given, which writes rows without running anything."""
    seen: list[Entry] = []

    def record(runner: Runner, entries: list[Entry]) -> None:
        seen.extend(entries)
        for store, case in entries:
            store.rows[case.name] = {"status": "ok", "micro_batch": case.micro_batch or case.net.batch}

    monkeypatch.setattr(Runner, "run", record)
    monkeypatch.setattr(grid, "device_of", lambda mode: "cpu")
    monkeypatch.setattr(grid, "results_folder", lambda mode, out: out)
    return seen, grid.run("cpu", 1.0, out, Console(quiet=True), parts)


def test_a_whole_batch_runs_once_and_stands_in_both_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries, stores = ran(monkeypatch, tmp_path, ("step", "pareto"))
    assert max(Counter(case for _, case in entries).values()) == 1
    for part, store in stores.items():
        assert set(store.rows) == {case.name for case in grid.GRIDS[part]("cpu")}
        assert Store(store.path, "cpu").rows.keys() == store.rows.keys() or part == "step"  # the runner writes that
    assert stores["pareto"].rows["resnet50/trady"] is stores["step"].rows["resnet50/trady"]


def test_what_matters_most_comes_first_and_what_compiles_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries, stores = ran(monkeypatch, tmp_path, ("step", "pareto"))
    turns = [(METHODS[c.method].is_costly, METHODS[c.method].is_key, c.micro_batch is not None) for _, c in entries]
    first_other = next(i for i, (_, is_key, _) in enumerate(turns) if not is_key)
    nets = settings("cpu")["nets"]
    assert {case.net.name for _, case in entries[:first_other]} == set(nets)
    assert [costly for costly, *_ in turns] == sorted(costly for costly, *_ in turns)
    left_out = {name for name, row in stores["step"].rows.items() if row.get("why") == grid.LEFT_OUT}
    costly = [name for name, method in METHODS.items() if method.is_costly]
    assert len(left_out) == len(costly) * (len(nets) - len(settings("cpu")["compiled"]))


def test_a_part_alone_runs_all_its_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries, stores = ran(monkeypatch, tmp_path, ("pareto",))
    assert {case.name for _, case in entries} == set(stores["pareto"].rows)
    assert {case.net.batch for _, case in entries if case.micro_batch is None} == {4, 8}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_names_cases_that_exist(mode: str) -> None:
    steps, pareto = grid.step_cases(mode), grid.pareto_cases(mode)
    assert {case.method for case in steps} == set(METHODS)
    assert {case.net.name for case in pareto} == set(settings(mode)["pareto"]) <= {case.net.name for case in steps}
    assert set(settings(mode)["compiled"]) <= {case.net.name for case in steps}
    assert len({case.name for case in (*steps, *pareto)}) == len({*steps, *pareto})


@pytest.mark.parametrize(
    ("batch", "count", "sizes"), [(8, 9, [8, 4, 2, 1]), (6, 9, [6, 3, 2, 1]), (128, 3, [128, 64, 32])]
)
def test_micro_batches_halve_the_batch(batch: int, count: int, sizes: list[int]) -> None:
    assert grid.micro_batches(batch, count) == sizes
