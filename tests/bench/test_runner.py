"""Cases run once, a killed process costs its case alone, and time that is up leaves the rest for the next run."""

import sys
from pathlib import Path

import pytest
from rich.console import Console

from trady_triton.bench import runner as runners
from trady_triton.bench.nets import Net
from trady_triton.bench.runner import OUT_OF_TIME, Case, Runner
from trady_triton.bench.store import Store
from trady_triton.bench.worker import LOST, MARK

NET = Net("mobilenetv2_w035", batch=2, image_size=32)
CASES = [Case(NET, method, ("16KiB", "64KiB", "256KiB"), 1) for method in ("head", "trady")]


def run(path: Path, cases: list[Case], minutes: float = 5.0) -> Store:
    store = Store(path / "step.json", "cpu")
    with Runner(Console(quiet=True), minutes, "test") as runner:
        runner.run([(store, case) for case in cases])
    return store


def test_a_stopped_benchmark_goes_on_and_runs_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, CASES[:1])
    assert first.rows["mobilenetv2_w035/head"]["status"] == "ok"
    second = run(tmp_path, CASES)
    assert second.rows["mobilenetv2_w035/head"] == first.rows["mobilenetv2_w035/head"]  # to the last digit of its times
    assert second.rows["mobilenetv2_w035/trady"]["status"] == "ok"
    monkeypatch.setattr(runners.subprocess, "Popen", None)  # nothing may be started any more
    assert run(tmp_path, CASES).rows == second.rows


def test_another_size_or_other_code_is_another_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "step.json", "cpu")
    store.put("a", CASES[0].inputs, {"status": "ok"})
    assert store.is_done("a", CASES[0].inputs)
    assert not store.is_done("a", CASES[1].inputs)
    assert Store(tmp_path / "step.json", "cpu").is_done("a", CASES[0].inputs)
    monkeypatch.setattr("trady_triton.bench.store.code_hash", lambda: "other")
    assert not store.is_done("a", CASES[0].inputs)


def test_when_the_time_is_up_rows_say_so_and_are_run_next_time(tmp_path: Path) -> None:
    store = run(tmp_path, CASES, minutes=0.0)
    assert [row["why"] for row in store.rows.values()] == [OUT_OF_TIME] * 2
    assert not any(store.is_done(case.name, case.inputs) for case in CASES)


def test_a_process_that_is_killed_costs_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "CASE_LIMIT", 0.0)
    store = run(tmp_path, CASES)
    for row in store.rows.values():
        assert row["status"] == "failed"
        assert "signal 9" in row["why"]


def test_a_case_that_loses_the_device_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"""print('{MARK}{{"status": "failed", "why": "an illegal memory access"}}'); raise SystemExit({LOST})"""
    monkeypatch.setattr(runners, "WORKER", [sys.executable, "-c", script])
    store = run(tmp_path, CASES)
    assert [row["why"] for row in store.rows.values()] == ["an illegal memory access"] * 2


def test_a_worker_that_does_not_start_is_a_row_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "WORKER", [sys.executable, "-c", f"raise SystemExit({LOST})"])
    store = run(tmp_path, CASES)
    assert ["ended with code" in row["why"] for row in store.rows.values()] == [True] * 2


def test_rows_of_cases_that_left_the_grid_are_forgotten(tmp_path: Path) -> None:
    store = Store(tmp_path / "step.json", "cpu")
    store.put("a", {}, {"status": "ok"})
    store.put("b", {}, {"status": "ok"})
    store.keep({"a"})
    assert set(Store(tmp_path / "step.json", "cpu").rows) == {"a"}
