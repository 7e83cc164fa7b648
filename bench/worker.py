"""The process in which the cases of one net run: a job as JSON on stdin, a line of JSON on stdout for every case.

What libraries print goes elsewhere: result lines start with a mark.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MARK = "@case "


def main() -> None:
    """Run a job: {"net": ..., "budgets": [...], "repeats": n, "cases": [[method, micro batch], ...]}."""
    job: dict[str, Any] = json.loads(sys.stdin.read())
    import torch

    from trady_triton.bench.case import Bench
    from trady_triton.bench.nets import Net

    torch.backends.cudnn.benchmark = True  # as timm's training script has it
    bench = Bench(Net.from_dict(job["net"]), job["budgets"], job["repeats"])
    for method, micro_batch in job["cases"]:
        print(MARK + json.dumps(bench.run(method, micro_batch)), flush=True)


if __name__ == "__main__":
    main()
