"""Bytes and FLOPs of a step as the ledger predicts them, at the nets' own sizes: exact, the same on every machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from trady_triton import choose_recompute, ledger
from trady_triton.bench.config import RESULTS
from trady_triton.bench.nets import Net
from trady_triton.bench.store import Store
from trady_triton.bench.tables import gflop, markdown, mib, wide_console
from trady_triton.bench.training import Setup

BUDGET, BATCH, IMAGE_SIZE = "1MiB", 8, 224
NETS = ("mobilenetv2_100", "tf_efficientnet_lite0", "resnet50", "efficientnet_b0", "convnext_tiny",
        "swin_tiny_patch4_window7_224", "vit_small_patch16_224")  # fmt: skip
_FIGURES = ("kept_bytes", "peak_bytes", "inference_bytes", "forward_flops", "dgrad_flops", "wgrad_flops")


def run(out: Path = RESULTS, console: Console | None = None, nets: tuple[str, ...] = NETS) -> Store:
    """Predict what the store does not hold yet."""
    console = console or Console()
    store = Store(out / "memory.json", "cpu")
    for name in track(nets, "predicted memory", console=console, disable=not console.is_terminal):
        inputs = {"net": name, "budget": BUDGET, "batch": BATCH, "image_size": IMAGE_SIZE}
        if not store.is_done(name, inputs):
            store.put(name, inputs, {**inputs, "status": "ok", **predict(Net(name, BATCH, IMAGE_SIZE))})
    return store


def predict(net: Net) -> dict[str, Any]:
    """Full fine-tuning and TraDy, epoch 0; blocks are recomputed where that keeps half or less."""
    model = net.build()
    setup = Setup(net, net.rank(model), (BUDGET,) * 3)
    plan = choose_recompute(setup.plan(), model, net.input_shape)
    books = {"full": ledger(model, None, net.input_shape), "trady": ledger(model, plan, net.input_shape)}
    rows = {name: {**asdict(book), "kept_bytes": book.kept_bytes} for name, book in books.items()}
    picked = {name: {figure: row[figure] for figure in _FIGURES} for name, row in rows.items()}
    return {**picked, "recomputed_blocks": len(plan.policy.recompute), "pool": len(plan.pool)}


def memory_table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a net."""
    columns = ("net", "kept: full", "kept: TraDy", "peak: full", "peak: TraDy", "peak of inference",
               "forward, dX, dW GFLOP: TraDy (full)", "blocks run twice")  # fmt: skip
    return markdown(columns, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    full, trady = row["full"], row["trady"]
    flops = [
        ", ".join(gflop(book[f"{kind}_flops"]) for kind in ("forward", "dgrad", "wgrad")) for book in (trady, full)
    ]
    return [row["net"], mib(full["kept_bytes"]), mib(trady["kept_bytes"]), mib(full["peak_bytes"]),
            mib(trady["peak_bytes"]), mib(full["inference_bytes"]), f"{flops[0]} ({flops[1]})",
            str(row["recomputed_blocks"] or "-")]  # fmt: skip


def main(out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS) -> None:
    """Predict memory and FLOPs."""
    console = wide_console()
    store = run(out, console)
    console.print(memory_table(list(store.rows.values())), highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    typer.run(main)
