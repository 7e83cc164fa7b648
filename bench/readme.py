"""Tables between markers in Markdown files: `<!-- bench:NAME -->` ... `<!-- /bench -->`, filled from results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trady_triton.bench.bench_bars import bars_table
from trady_triton.bench.bench_memory import memory_table
from trady_triton.bench.equal_memory import summary
from trady_triton.bench.markers import fill_blocks
from trady_triton.bench.methods import METHODS
from trady_triton.bench.paper_setting import NET, setting_table
from trady_triton.bench.store import KIND, Row
from trady_triton.bench.tables import markdown, mib, origin, short
from trady_triton.bench.tables_lean import error_table, kept_table, peak_table
from trady_triton.serial import read_json


def demo_table(content: Row) -> str:
    """What `make demo` found, where and in what time."""
    columns = ("method", "test accuracy", "budget used, KiB", "kept for backward, MiB", "peak of a step, MiB",
               "dW MFLOP", "s per step")  # fmt: skip
    rows = []
    for result in content["results"]:
        method, cost = result["method"], result["cost"]
        budget = result["budget_bytes"]
        used = "-" if budget is None else f"{cost['channel_bytes'] / 1024:,.1f} of {budget / 1024:,.0f}"
        rows.append((f"{method['label']} (lr {method['lr']:g})", f"{100 * result['accuracy'][-1]:.1f} %", used,
                     mib(cost["kept_bytes"]), mib(cost["peak_bytes"]), short(cost["wgrad_flops"] / 1e6),
                     f"{result['step_seconds']:.3f}"))  # fmt: skip
    versions = ", ".join(f"{name} {content['versions'][name]}" for name in ("torch", "timm"))
    where = f"{content['device']}, {versions}, {content['date']}; {content['seconds']:.0f} s after set-up."
    return f"{where}\n\n{markdown(columns, rows)}"


def steps_table(content: Row) -> str:
    """Peak and time of a step, a row a net, of the methods that matter most."""
    chosen = ("full", "full-ckpt", "pool", "pool-ckpt", "last", "last-lean", "lora", "trady-lean", "trady")
    columns = ("net, batch, px", *(METHODS[name].label for name in chosen), "inference peak")
    rows = []
    for net in dict.fromkeys(row["net"] for row in content["cases"].values()):
        found = {name: content["cases"].get(f"{net}/{name}", {"status": "missing"}) for name in chosen}
        first = next(row for row in content["cases"].values() if row["net"] == net)
        floor = next((mib(row["inference_bytes"]) for row in found.values() if row["status"] == "ok"), "-")
        cells = [f"{mib(row['peak_bytes'])}, {row['ratio']:.2f}" if row["status"] == "ok" else "-"
                 for row in found.values()]  # fmt: skip
        rows.append((f"{net}, {first['batch']}, {first['image_size']}", *cells, floor))
    return markdown(columns, rows)


def _each_device(table: Callable[[Row], str]) -> Callable[[list[Row]], str]:
    """The table of every device, each under the line that says where its numbers come from."""
    return lambda contents: "\n\n".join(f"{origin(content)}\n\n{table(content)}" for content in contents)


# Marker -> (pattern of files below bench/results, their format, table of their contents)
TABLES: dict[str, tuple[str, str, Callable[[list[Row]], str]]] = {
    "memory": ("memory.json", KIND, lambda contents: memory_table(list(contents[0]["cases"].values()))),
    "demo": ("demo.json", "demo", lambda contents: demo_table(contents[0])),
    "steps": ("*/step.json", KIND, _each_device(steps_table)),
    "bars": ("*/bars.json", KIND, _each_device(bars_table)),
    "equal_memory": ("*/pareto.json", KIND, _each_device(lambda content: summary(list(content["cases"].values())))),
    "lean_kept": ("lean.json", KIND, lambda contents: kept_table(list(contents[0]["cases"].values()))),
    "lean_errors": ("lean.json", KIND, lambda contents: error_table(list(contents[0]["cases"].values()))),
    "paper_setting": ("paper_setting.json", KIND, lambda contents: setting_table(contents[0]["cases"][NET])),
    "lean_peak": ("lean.json", KIND, lambda contents: peak_table(list(contents[0]["cases"].values()))),
}


def filled(text: str, results: Path) -> str:
    """The text with every table made anew; a table whose results are not there stays as it is.

    Raises:
        ValueError: a marker that no table belongs to.
    """

    def table(name: str) -> str | None:
        _, kind, make = TABLES[name]
        contents = [read_json(path, kind) for path in sources(name, results)]
        return make(contents) if contents else None

    return fill_blocks(text, "bench", TABLES, table)


def sources(name: str, results: Path) -> list[Path]:
    """The files of results that a table is made from; those of quick runs are not shown."""
    return sorted(path for path in results.glob(TABLES[name][0]) if not path.parent.name.endswith("-quick"))


def fill(path: Path, results: Path) -> bool:
    """Fill the tables of a file; whether anything changed."""
    before = path.read_text()
    after = filled(before, results)
    path.write_text(after)
    return after != before
