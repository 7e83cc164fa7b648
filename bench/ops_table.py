"""The table of kernels, from what pytest-benchmark wrote."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from trady_triton.bench.store import Row, Store
from trady_triton.bench.tables import markdown

COLUMNS = ("op", "way", "us", "GB/s", "TFLOP/s", "time / floor", "dense / it")


def run(folder: Path, device: str, batch: int | None = None) -> Store:
    """Run bench_ops.py unless the store holds its result; an earlier run is compared with, and then replaced."""
    store, raw = Store(folder / "ops.json", device), folder / "ops-benchmark.json"
    inputs: Row = {"batch": batch, "device": device}
    if store.is_done("ops", inputs):
        return store
    folder.mkdir(parents=True, exist_ok=True)
    scratch = raw.with_suffix(".part")
    command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name("bench_ops.py")), "-q", "-p",
               "no:cacheprovider", "--benchmark-enable", "--benchmark-columns=median,iqr", "--benchmark-sort=name",
               f"--benchmark-json={scratch}"]  # fmt: skip
    if raw.exists():
        command.append(f"--benchmark-compare={raw}")
    environment = {"BENCH_OPS_BATCH": str(batch)} if batch else {}
    done = subprocess.run(["env", *[f"{k}={v}" for k, v in environment.items()], *command])
    if not scratch.exists():
        store.put("ops", inputs, {"status": "failed", "why": f"pytest ended with code {done.returncode}"})
        return store
    scratch.replace(raw)
    rows = rows_of(json.loads(raw.read_text()))
    failed = "" if done.returncode == 0 else f"pytest ended with code {done.returncode}; what failed has no row"
    store.put("ops", inputs, {"status": "ok", "rows": rows, "why": failed})
    return store


def rows_of(raw: dict[str, Any]) -> list[Row]:
    """Seconds of a call (median), and what it moved and computed."""
    rows = []
    for entry in raw["benchmarks"]:
        info = entry["extra_info"]
        rows.append({**info, "seconds": entry["stats"]["median"] / info["calls"]})
    return rows


def ops_table(content: dict[str, Any]) -> str:
    """Markdown; "dense / it" is how many times as long the dense gradient takes."""
    case = content["cases"]["ops"]
    if case["status"] != "ok":
        return f"Not measured: {case['why']}."
    rows = case["rows"]
    dense = {row["layer"]: row["seconds"] for row in rows if row["way"] == "dense"}
    ways = {row["way"] for row in rows}
    first = rows[0]
    text = (
        "dW of drawn channels from the compact store, the store itself, a packed ReLU6, the update; dense is what "
        "plain training does in their place, but of the store, of which plain training has none, a copy of the whole "
        f"input. Batch {first['batch']}, {first['dtype']}. Measured roofs: "
        f"{first['gbytes_per_s']:,.0f} GB/s, {first['tflops']:.3g} TFLOP/s; the floor is the longer of bytes and "
        "FLOPs at these. Every result is checked before it is timed."
    )
    if "triton" not in ways:
        text += (" The Triton kernels have no row: they need a GPU; the twin is what runs on this device. Small inputs "
                 "lie in its caches, which can beat the floor.")  # fmt: skip
    cells = [_cells(row, dense.get(row["layer"])) for row in rows]
    gains = [dense[row["layer"]] / row["seconds"] for row in rows
             if row["way"] != "dense" and row["layer"] in dense and row["flops"]]  # fmt: skip
    mean = f"\n\nGeometric mean of dense / it over the dW: {statistics.geometric_mean(gains):.2f}." if gains else ""
    return text + "\n\n" + markdown(COLUMNS, cells) + mean


def _cells(row: Row, dense: float | None) -> list[str]:
    seconds = row["seconds"]
    return [row["layer"], row["way"], f"{1e6 * seconds:,.0f}", f"{row['bytes'] / seconds / 1e9:,.1f}",
            f"{row['flops'] / seconds / 1e12:.3g}" if row["flops"] else "-", f"{seconds / row['floor_s']:.2f}",
            "-" if dense is None else f"{dense / seconds:.2f}"]  # fmt: skip
