"""Tables between markers in Markdown files: `<!-- bench:NAME -->` ... `<!-- /bench -->`, filled from results."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from trady_triton.bench.bench_memory import memory_table
from trady_triton.bench.store import KIND, Row
from trady_triton.bench.tables import markdown, mib, short
from trady_triton.serial import read_json

_BLOCK = re.compile(r"<!-- bench:(\w+) -->\n(.*?)<!-- /bench -->", re.DOTALL)


def demo_table(content: Row) -> str:
    """What `make demo` found."""
    columns = ("method", "test accuracy", "kept for backward, MiB", "peak of a step, MiB", "dW MFLOP", "s per step")
    rows = []
    for result in content["results"]:
        method, cost = result["method"], result["cost"]
        rows.append((f"{method['label']} (lr {method['lr']:g})", f"{100 * result['accuracy'][-1]:.1f} %",
                     mib(cost["kept_bytes"]), mib(cost["peak_bytes"]), short(cost["wgrad_flops"] / 1e6),
                     f"{result['step_seconds']:.3f}"))  # fmt: skip
    return markdown(columns, rows)


# Marker -> (file below bench/results, its format, table)
TABLES: dict[str, tuple[str, str, Callable[[Row], str]]] = {
    "memory": ("memory.json", KIND, lambda content: memory_table(list(content["cases"].values()))),
    "demo": ("demo.json", "demo", demo_table),
}


def filled(text: str, results: Path) -> str:
    """The text with every table made anew; a table whose results are not there stays as it is.

    Raises:
        ValueError: a marker that no table belongs to.
    """

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"marker bench:{name}: wanted one of {', '.join(TABLES)}")
        file, kind, make = TABLES[name]
        if not (results / file).exists():
            return match[0]
        return f"<!-- bench:{name} -->\n{make(read_json(results / file, kind))}\n<!-- /bench -->"

    return _BLOCK.sub(table, text)


def fill(path: Path, results: Path) -> bool:
    """Fill the tables of a file; whether anything changed."""
    before = path.read_text()
    after = filled(before, results)
    path.write_text(after)
    return after != before
