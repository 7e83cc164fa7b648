"""The process in which cases run: a list of them as JSON on stdin, a line of JSON on stdout for every one.

What libraries print goes elsewhere: result lines start with a mark.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import sys
from typing import Any

MARK = "@case "
LOST = 3  # exit code where a case has left the device unusable for this process


def main() -> None:
    """Run cases, `Case.inputs` each; those of one net share its ranking and the verdicts of its gate."""
    cases: list[dict[str, Any]] = json.loads(sys.stdin.read())
    import torch

    from trady_triton.bench.case import Bench, failure
    from trady_triton.bench.methods import METHODS
    from trady_triton.bench.nets import Net

    torch.backends.cudnn.benchmark = True  # as timm's training script has it
    _preload({METHODS[case["method"]].package for case in cases})
    benches: dict[tuple[Net, tuple[str, ...]], Bench] = {}
    for case in cases:
        net, budgets = Net.from_dict(case["net"]), tuple(case["budgets"])
        try:
            for other in benches.keys() - {(net, budgets)}:
                benches[other].gate.forget()
            if (net, budgets) not in benches:
                benches[net, budgets] = Bench(net, budgets)
            row = benches[net, budgets].run(case["method"], case["repeats"], case["micro_batch"])
        except Exception as error:  # the net itself fails
            row = failure(error)
        print(MARK + json.dumps(row), flush=True)
        if torch.cuda.is_initialized() and not _is_usable():  # type: ignore[no-untyped-call]
            sys.exit(LOST)
        _collect()


def _preload(packages: set[str | None]) -> None:
    """Import packages before any case runs."""
    for package in packages - {None}:
        with contextlib.suppress(Exception):  # the case that needs it will say why it fails
            importlib.import_module(str(package))
    _collect()


def _is_usable() -> bool:
    """Whether what a case has started on the GPU ends well: after a wrong access to memory nothing runs any more."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _collect() -> None:
    """Free what a case has left behind; what outlives it is exempt from then on, as a search of it all takes long."""
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    main()
