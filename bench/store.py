"""Results of cases in one JSON file, from which a stopped benchmark goes on: what is done is not run again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trady_triton.bench.circumstances import circumstances, code_hash, commit, versions
from trady_triton.serial import read_json, write_json

KIND = "bench"
Row = dict[str, Any]


class Store:
    """The rows of one benchmark on one device: case id -> row. Every `put` writes the file."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.rows: dict[str, Row] = read_json(path, KIND)["cases"] if path.exists() else {}

    def is_done(self, case: str, inputs: Row) -> bool:
        """Whether the case was run to an end with these inputs, this code and these versions."""
        row = self.rows.get(case)
        return row is not None and row.get("key") == key(inputs) and row["status"] != "unfinished"

    def put(self, case: str, inputs: Row, row: Row) -> None:
        """Note the row of a case."""
        stamp = {"key": key(inputs), "commit": commit(), "date": time.strftime("%Y-%m-%d")}
        self.rows[case] = row | stamp
        self.write()

    def copy(self, sources: Mapping[str, Store]) -> None:
        """Take over rows of cases from other stores."""
        self.rows |= {case: store.rows[case] for case, store in sources.items()}
        self.write()

    def keep(self, cases: set[str]) -> None:
        """Forget all other cases."""
        if self.rows.keys() - cases:
            self.rows = {case: row for case, row in self.rows.items() if case in cases}
            self.write()

    def write(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, KIND, {**circumstances(self.device), "cases": self.rows})


def key(inputs: Row) -> str:
    """16 hexadecimal digits that differ where a case, the code or the versions differ."""
    content = json.dumps([inputs, code_hash(), versions()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
