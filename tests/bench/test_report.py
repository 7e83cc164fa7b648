"""Reports and README tables come from JSON alone."""

import json
from pathlib import Path

import pytest
import torch

from trady_triton.bench.equal_memory import front, verdict_table, verdicts
from trady_triton.bench.readme import TABLES, filled, sources
from trady_triton.bench.report import FILES, report, write
from trady_triton.bench.store import Store
from trady_triton.bench.tables import spread, step_cells

ROOT = Path(__file__).parent.parent.parent


def row(method: str, peak_mib: float | None, ratio: float, micro_batch: int = 4, **more) -> dict:
    gate = {"contract": "dense", "error": 0.0, "limit": 1e-8, "working_error": None, "why": "", "is_green": True}
    return {
        "net": "net", "batch": 8, "image_size": 32, "device": "cpu", "autocast": None, "method": method,
        "label": f"label of {method}", "micro_batch": micro_batch, "status": "ok", "gate": gate, "kept_bytes": 1 << 20,
        "peak_bytes": None if peak_mib is None else int(peak_mib * 2**20), "inference_bytes": 1 << 19, "ratio": ratio,
        "forward_flops": 2 * 10**9, "dgrad_flops": 10**9, "wgrad_flops": 10**6, "ms": [ratio, 1.04 * ratio],
        "full_ms": [1.0, 1.0], **more,
    }  # fmt: skip


ROWS = [
    row("trady-lean", 10, 0.8, 1),
    row("trady-lean", 12, 0.6, 2),
    row("trady-lean", 18, 0.5, 4),
    row("pool", 19, 0.49, 1),
    row("pool-ckpt", 11, 0.9, 1),
    row("pool", 40, 0.1, 4),
    row("last", 15, 0.3, 4),
]


def test_verdicts_take_the_fastest_of_each_side_within_a_peak() -> None:
    found = {round(v.peak_bytes / 2**20): v for v in verdicts(ROWS)}
    assert sorted(found) == [10, 11, 12, 15, 18, 19]  # 20 changes nothing, 40 is more than twice the least
    assert found[10].dense is None
    assert "does not fit" in found[10].winner
    assert found[11].dense["method"] == "pool-ckpt"
    assert found[11].winner == "TraDy, 1.12x as fast"
    assert found[12].last is None
    assert found[15].last["ratio"] == 0.3
    assert found[19].dense["ratio"] == 0.49
    assert found[19].winner == "tie"  # 2 % apart


def test_a_faster_rival_is_called_the_winner() -> None:
    slow = [row("trady", 10, 0.9), row("pool", 12, 0.6)]
    assert verdicts(slow)[-1].winner == "dense pool, 1.50x as fast"
    assert "dense pool, 1.50x as fast" in verdict_table(slow)


def test_the_front_holds_what_nothing_beats_in_peak_and_time_at_once() -> None:
    assert [(r["method"], r["micro_batch"]) for r in front(ROWS)] == [("trady-lean", 1), ("trady-lean", 2), ("last", 4),
                                                                      ("pool", 4)]  # fmt: skip
    assert front([row("full-compiled", None, 0.1)]) == []  # its peak is not known


def test_cells_show_the_four_memory_numbers_and_the_predictions() -> None:
    planned = row("trady", 10, 0.5, budget_bytes=64 << 10, predicted_kept_bytes=1 << 20, predicted_peak_bytes=10 << 20)
    assert step_cells(planned) == ["label of trady", "64", "1.00", "1.00", "10.0", "10.0", "0.50", "2.00, 1.00, 0.00",
                                   "0.50", "0"]  # fmt: skip
    assert step_cells(row("full", None, 1.0))[1:6] == ["-", "1.00", "-", "-", "-"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind in ("step", "pareto"):
        store = Store(tmp_path / f"{kind}.json", "cpu")
        for entry in ROWS:
            store.put(f"{entry['method']}/{entry['micro_batch']}", {}, entry)
        lost = {**row("galore", 1, 1.0), "status": "failed", "why": "RuntimeError: it broke"}
        store.put("galore", {}, lost)
    return tmp_path


def test_a_report_shows_rows_verdicts_and_why_something_has_no_number(folder: Path) -> None:
    text = write(folder).read_text()
    assert text == report(folder)
    assert "label of trady-lean" in text
    assert "label of galore: failed, RuntimeError: it broke" in text
    assert "TraDy is the faster at 5 of 6 peaks; it is not at 19.0 MiB (tie)" in text
    assert "training the last two blocks instead is faster than TraDy at 3 of them" in text
    assert (folder / "pareto-net.png").stat().st_size > 10_000


def test_a_report_changes_with_its_numbers(folder: Path) -> None:
    before = report(folder)
    content = json.loads((folder / "step.json").read_text())
    content["cases"]["pool/4"]["ratio"] = 0.777
    (folder / "step.json").write_text(json.dumps(content))
    assert "0.78" in report(folder)
    assert "0.78" not in before


def test_how_far_rounds_lie_apart_is_told() -> None:
    wide = {"ms": [1.0, 2.0, 3.0], "full_ms": [1.0, 1.0, 2.0]}
    assert spread([*ROWS, row("head", 5, 1.0, **wide)]) == (
        "The two or more rounds of a row lie 4% apart in the middle row, 100% in the widest of 8."
    )
    assert spread([row("head", 5, 1.0, ms=[1.0], full_ms=[1.0])]) == "Every time was taken once."


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results; run `make bench`"):
        report(tmp_path)


def memory_results(tmp_path: Path) -> Path:
    book = {"kept_bytes": 5 << 20, "peak_bytes": 9 << 20, "inference_bytes": 2 << 20, "forward_flops": 10**9,
            "dgrad_flops": 10**9, "wgrad_flops": 10**7}  # fmt: skip
    store = Store(tmp_path / "memory.json", "cpu")
    store.put("net", {}, {"net": "net", "status": "ok", "full": book, "trady": book, "recomputed_blocks": 0, "pool": 3})
    return tmp_path


def test_tables_between_markers_are_made_from_results_and_the_rest_stays(tmp_path: Path) -> None:
    text = "before\n<!-- bench:memory -->\nold\n<!-- /bench -->\nafter\n<!-- bench:demo -->\nkept\n<!-- /bench -->\n"
    assert filled(text, tmp_path) == text  # no results yet
    new = filled(text, memory_results(tmp_path))
    assert "old" not in new
    assert "| net | 5.00 | 5.00 | 9.00 | 9.00 | 2.00 | 1.00, 1.00, 0.01 (1.00, 1.00, 0.01) | - |" in new
    assert new.startswith("before\n")
    assert new.endswith("after\n<!-- bench:demo -->\nkept\n<!-- /bench -->\n")
    assert filled(new, tmp_path) == new


def test_an_unknown_marker_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="marker bench:speed: wanted one of memory, demo, steps, bars, equal_memory"):
        filled("<!-- bench:speed -->\n<!-- /bench -->", tmp_path)


@pytest.mark.parametrize("file", FILES.split(","))
def test_tables_of_the_readme_agree_with_the_results(file: str) -> None:
    text = (ROOT / file).read_text()
    assert filled(text, ROOT / "bench" / "results") == text, "run: python -m trady_triton.bench.report"


def test_every_table_that_has_results_stands_in_the_readme() -> None:
    text = "".join((ROOT / file).read_text() for file in FILES.split(","))
    for name in TABLES:
        if sources(name, ROOT / "bench" / "results"):
            assert f"<!-- bench:{name} -->" in text


def test_readme_tables_of_devices_say_where_they_come_from_and_leave_quick_runs_out(folder: Path) -> None:
    for name in ("amd", "amd-quick"):
        (folder / name).mkdir()
        for kind in ("step", "pareto"):
            (folder / name / f"{kind}.json").write_bytes((folder / f"{kind}.json").read_bytes())
    for name in ("steps", "equal_memory"):
        new = filled(f"<!-- bench:{name} -->\n<!-- /bench -->", folder)
        assert new.count("| net, 8, 32 |") == 1
        assert f"torch {torch.__version__.partition('+')[0]}" in new
    assert "| 10.0 | 11.0 | 15.0 | 0.80 / - / - | 0.60 / 0.90 / - | 0.60 / 0.90 / 0.30 | 0.50 / 0.49 / 0.30 |" in new
