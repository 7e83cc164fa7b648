"""What a peak of memory buys: Pareto fronts, and TraDy against the same pool trained dense within the same peak."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console

from trady_triton.bench.tables import Row, markdown, mib

TRADY = ("trady", "trady-lean", "trady-small")
DENSE = ("pool", "pool-ckpt")
LAST = ("last", "last-lean")
TIE = 0.05  # ratios that are closer than this, relative, say nothing


@dataclass(frozen=True)
class Verdict:
    """The fastest of each side within a peak; None where nothing fits. Times are ratios to full fine-tuning."""

    net: str
    peak_bytes: int
    trady: Row
    dense: Row | None
    last: Row | None

    @property
    def winner(self) -> str:
        """TraDy or the dense pool, or a tie."""
        if self.dense is None:
            return "TraDy (the dense pool does not fit)"
        relation = self.trady["ratio"] / self.dense["ratio"]
        if abs(relation - 1) <= TIE:
            return "tie"
        return f"TraDy, {1 / relation:.2f}x as fast" if relation < 1 else f"dense pool, {relation:.2f}x as fast"


def points(rows: Iterable[Row], methods: Sequence[str] | None = None) -> list[Row]:
    """Measured rows with a peak, of some methods."""
    return [row for row in rows if row["status"] == "ok" and row["peak_bytes"] is not None
            and (methods is None or row["method"] in methods)]  # fmt: skip


def front(rows: Iterable[Row]) -> list[Row]:
    """The rows that no other beats in peak and time at once, by rising peak."""
    best: list[Row] = []
    for row in sorted(points(rows), key=lambda row: (row["peak_bytes"], row["ratio"])):
        if not best or row["ratio"] < best[-1]["ratio"]:
            best.append(row)
    return best


def fastest(rows: Iterable[Row], peak_bytes: int) -> Row | None:
    """The fastest row within a peak."""
    fitting = [row for row in rows if row["peak_bytes"] <= peak_bytes]
    return min(fitting, key=lambda row: row["ratio"]) if fitting else None


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """At every peak from the smallest in which TraDy works to twice that, wherever an answer changes, for one net."""
    rows = points(rows)
    trady, dense, last = (points(rows, methods) for methods in (TRADY, DENSE, LAST))
    if not trady:
        return []
    least = min(row["peak_bytes"] for row in trady)
    peaks = sorted({row["peak_bytes"] for row in rows if least <= row["peak_bytes"] <= 2 * least} | {2 * least})
    found: list[Verdict] = []
    for peak in peaks:
        mine = fastest(trady, peak)
        assert mine is not None
        verdict = Verdict(mine["net"], peak, mine, fastest(dense, peak), fastest(last, peak))
        if not found or (found[-1].trady, found[-1].dense, found[-1].last) != (mine, verdict.dense, verdict.last):
            found.append(verdict)
    return found


def cell(row: Row | None) -> str:
    """A row as time and how it is run."""
    if row is None:
        return "does not fit"
    kind = {"pool-ckpt": "checkpointed, ", "full-ckpt": "checkpointed, ", "trady": "blocks recomputed, "}
    return f"{row['ratio']:.2f} ({kind.get(row['method'], '')}micro-batch {row['micro_batch']})"


def verdict_table(rows: Sequence[Row]) -> str:
    """Markdown: one row for every peak at which an answer changes, net by net."""
    rivals = ("TraDy", "TraDy's pool, dense", "last 2 blocks")
    columns = ("net", "within a peak of, MiB", *rivals, "faster of TraDy and that pool")
    nets = dict.fromkeys(row["net"] for row in rows)
    found = [verdict for net in nets for verdict in verdicts(row for row in rows if row["net"] == net)]
    return markdown(
        columns,
        [(v.net, mib(v.peak_bytes), cell(v.trady), cell(v.dense), cell(v.last), v.winner) for v in found],
    )


def summary(rows: Sequence[Row], factors: Sequence[float] = (1.0, 1.25, 1.5, 2.0)) -> str:
    """Markdown, a row a net: the smallest peaks, and the times at some multiples of TraDy's smallest peak."""
    columns = ("net, batch, px", "smallest peak, MiB: TraDy", "dense pool", "last 2 blocks",
               *(f"time at {factor:g}x: TraDy / dense pool / last 2 blocks" for factor in factors))  # fmt: skip
    lines = []
    for net in dict.fromkeys(row["net"] for row in rows):
        sides = [points((row for row in rows if row["net"] == net), side) for side in (TRADY, DENSE, LAST)]
        least = [min((row["peak_bytes"] for row in side), default=None) for side in sides]
        if least[0] is None:
            continue
        times = [[fastest(side, int(factor * least[0])) for side in sides] for factor in factors]
        cells = [" / ".join("-" if row is None else f"{row['ratio']:.2f}" for row in at) for at in times]
        lines.append((f"{net}, {sides[0][0]['batch']}, {sides[0][0]['image_size']}", *map(mib, least), *cells))
    return markdown(columns, lines)


def show_verdicts(console: Console, rows: Sequence[Row]) -> None:
    """Print the table."""
    console.print(verdict_table(rows), highlight=False, soft_wrap=True, markup=False)
