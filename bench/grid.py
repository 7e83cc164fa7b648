"""The cases of a mode: whole steps of every method on every net, and micro-batches of the methods that decide."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from trady_triton.bench.config import RESULTS, device_of, nets_of, results_folder, settings
from trady_triton.bench.methods import METHODS
from trady_triton.bench.nets import Net
from trady_triton.bench.runner import Case, Runner
from trady_triton.bench.store import Store

# In the equal-memory view TraDy, its pool trained dense and the last blocks decide.
DECIDING = ("trady-lean", "trady", "pool", "pool-ckpt", "last", "last-lean")
OTHERS = ("trady-small", "full", "full-ckpt", "head")
LEFT_OUT = "left out on this net: it compiles for minutes; settings.json says where it runs"


def step_cases(mode: str) -> list[Case]:
    """Every method on every net, the whole batch at once."""
    return [_case(mode, net, method) for net in nets_of(mode) for method in METHODS]


def pareto_cases(mode: str) -> list[Case]:
    """Some methods on some nets, at micro-batches from the whole batch down."""
    content = settings(mode)
    return [_case(mode, net, method, size if size < net.batch else None)
            for net in nets_of(mode, content["pareto"]) for size in micro_batches(net.batch, content["micro_batches"])
            for method in (*DECIDING, *OTHERS)]  # fmt: skip


def _case(mode: str, net: Net, method: str, micro_batch: int | None = None) -> Case:
    content = settings(mode)
    return Case(net, method, tuple(content["budgets"]), content["repeats"], micro_batch)


def micro_batches(batch: int, count: int) -> list[int]:
    """The batch, its half, ... as many as are wanted, down to 1."""
    sizes = [batch]
    while sizes[-1] > 1 and len(sizes) < count:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


GRIDS = {"step": step_cases, "pareto": pareto_cases}


def run(mode: str, minutes: float, out: Path = RESULTS, console: Console | None = None,
        parts: tuple[str, ...] = tuple(GRIDS)) -> dict[str, Store]:  # fmt: skip
    """Run parts of the grid, or go on with them; what matters most comes first, in case the time does not suffice."""
    cases = {part: GRIDS[part](mode) for part in parts}
    stores = {part: Store(results_folder(mode, out) / f"{part}.json", device_of(mode)) for part in parts}
    homes: dict[Case, Store] = {}  # a case that belongs to two parts runs once
    for part, store in stores.items():
        store.keep({case.name for case in cases[part]})
        homes = dict.fromkeys(cases[part], store) | homes
    entries = [(store, case) for case, store in homes.items() if not _is_left_out(mode, case, store)]
    with Runner(console or Console(), minutes, "benchmarks") as runner:
        runner.run(sorted(entries, key=lambda entry: _turn(mode, entry[1])))
    for part, store in stores.items():
        store.copy({case.name: homes[case] for case in cases[part] if homes[case] is not store})
    return stores


def _is_left_out(mode: str, case: Case, store: Store) -> bool:
    """Whether a case compiles for too long to be run; then its row says so."""
    if not METHODS[case.method].is_costly or case.net.name in settings(mode)["compiled"]:
        return False
    store.put(case.name, {"left out": case.inputs}, case.described() | {"status": "unavailable", "why": LEFT_OUT})
    return True


def _turn(mode: str, case: Case) -> tuple[bool, bool, bool, bool]:
    """The methods that matter most, first on the nets of the equal-memory view; then the others; then compiled code."""
    method, is_part = METHODS[case.method], case.micro_batch is not None
    is_key = case.method in DECIDING if is_part else method.is_key
    return method.is_costly, not is_key, case.net.name not in settings(mode)["pareto"], is_part
