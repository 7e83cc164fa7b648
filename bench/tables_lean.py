"""What lean modules keep, net by net: exact counts on fake tensors, and the tables of `trady_triton/nn/README.md`.

One setting for all: float32, BatchNorm in eval mode, two channels of the layer at 25 % depth and the head trained.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from torch import nn

import trady_triton.models  # noqa: F401  teaches timm's types
from trady_triton import Plan, Policy, choose_recompute
from trady_triton.bench import paper_setting
from trady_triton.bench.config import RESULTS
from trady_triton.bench.dw_error import errors
from trady_triton.bench.one_layer import plan_at
from trady_triton.bench.store import Store
from trady_triton.bench.tables import markdown, wide_console
from trady_triton.meters import KeptBytes, peak_memory
from trady_triton.rehearsal import fake_copy, train_under

README = Path("trady_triton/nn/README.md")
SHAPE = (8, 3, 224, 224)
NETS = (
    "mobilenetv2_035", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv4_conv_small", "mnasnet_100",
    "tf_efficientnet_lite0", "efficientnet_b0", "fbnetc_100", "ghostnet_100", "resnet18", "resnet50", "regnety_008",
    "densenet121", "vgg11_bn", "convnext_tiny", "convnextv2_atto", "vit_tiny_patch16_224", "vit_small_patch16_224",
    "vit_base_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "mobilevit_s", "efficientvit_b0",
    "mixer_s16_224", "poolformer_s12", "eva02_tiny_patch14_224", "maxvit_tiny_tf_224", "coatnet_0_rw_224",
)  # fmt: skip
PACKED = ("efficientnet_b0", "mobilenetv3_large_100", "regnety_008", "convnext_tiny", "vit_tiny_patch16_224",
          "swin_tiny_patch4_window7_224")  # fmt: skip


def run(out: Path = RESULTS, console: Console | None = None, nets: tuple[str, ...] = NETS) -> Store:
    """Count what the store does not hold yet."""
    console = console or Console()
    store = Store(out / "lean.json", "cpu")
    for name in track(nets, "lean modules", console=console, disable=not console.is_terminal):
        inputs = {"net": name, "batch": 2 if name.startswith("vit_base") else SHAPE[0]}
        if not store.is_done(name, inputs):
            store.put(name, inputs, {**inputs, "status": "ok", **count(name, inputs["batch"])})
    paper = Store(out / "paper_setting.json", "cpu")
    if not paper.is_done(paper_setting.NET, {}):
        paper.put(paper_setting.NET, {}, {"status": "ok", **paper_setting.count()})
    return store


def count(name: str, batch: int) -> dict[str, Any]:
    """Bytes kept by each way to train, peaks of its step, and what packing does to dW of the nets of `PACKED`."""
    torch.manual_seed(0)
    model, shape = timm.create_model(name), (batch, *SHAPE[1:])
    plan = plan_at(model, shape, 0.25)
    lean = choose_recompute(plan, model, shape)
    packed = choose_recompute(replace(plan, policy=Policy(activations=8)), model, shape)
    row = {
        "full": step_bytes(model, None, shape),
        "lean": step_bytes(model, lean, shape),
        "8 bits": step_bytes(model, packed, shape),
        "inference": inference_bytes(model, shape),
        "recomputed": list(lean.policy.recompute),
        "parts": lean.policy.recompute_parts,
    }
    trained = [model.get_submodule(layer) for layer in (*plan.head, *plan.pool)]
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    row["frozen"] = step_bytes(model, None, shape)
    with suppress(AssertionError):  # timm's way to say that a net knows no checkpointing
        model.set_grad_checkpointing()
        row["checkpointed"] = step_bytes(model, None, shape)
    return row | ({"dW error": errors(name)} if name in PACKED else {})


def step_bytes(model: nn.Module, plan: Plan | None, shape: tuple[int, ...]) -> dict[str, int]:
    """Bytes kept by a forward, and the peak of forward and backward, beyond weights and batch."""
    channels = {} if plan is None else dict.fromkeys(plan.pool, (0, 1))
    with fake_copy(model) as twin:
        train_under(twin, plan, channels)
        twin.eval()
        x, y = torch.empty(shape), torch.empty(shape[0], dtype=torch.int64)
        with KeptBytes(twin) as kept:
            loss = F.cross_entropy(twin(x), y)
        del loss
        with peak_memory() as memory:
            F.cross_entropy(twin(x), y).backward()
        return {"kept": kept.total, "peak": memory.peak_bytes}


def inference_bytes(model: nn.Module, shape: tuple[int, ...]) -> int:
    """The peak of a forward that keeps nothing."""
    with fake_copy(model) as twin, torch.no_grad():
        x = torch.empty(shape)
        twin.eval()
        with peak_memory() as memory:
            twin(x)
    return memory.peak_bytes


def kept_table(rows: list[dict[str, Any]]) -> str:
    """Megabytes kept, a row a net."""
    ways = ("full", "frozen", "checkpointed", "lean", "8 bits")
    columns = ("net", "full fine-tuning", "frozen, plain torch", "frozen, timm's checkpointing", "lean, exact",
               "lean, 8 bits", "full / lean", "full / 8 bits")  # fmt: skip
    lines = []
    for row in rows:
        kept = {way: row[way]["kept"] / 1e6 for way in ways if way in row}
        ratios = [f"{kept['full'] / kept[way]:.0f}" for way in ("lean", "8 bits")]
        lines.append([row["net"], *(f"{kept[way]:.2f}" if way in kept else "-" for way in ways), *ratios])
    return markdown(columns, lines)


def peak_table(rows: list[dict[str, Any]]) -> str:
    """MiB at the peak of a step, a row a net."""
    columns = ("net", "inference", "full fine-tuning", "frozen, timm's checkpointing", "lean, exact",
               "lean / inference", "units that run twice", "in parts of the batch")  # fmt: skip
    lines = []
    for row in rows:
        peaks = [row["inference"], *(row.get(way, {}).get("peak") for way in ("full", "checkpointed", "lean"))]
        ratio, units = f"{row['lean']['peak'] / row['inference']:.2f}", len(row["recomputed"])
        lines.append([row["net"], *("-" if peak is None else f"{peak / 2**20:.1f}" for peak in peaks), ratio,
                      str(units), str(row["parts"]) if units else "-"])  # fmt: skip
    return markdown(columns, lines)


def error_table(rows: list[dict[str, Any]]) -> str:
    """Relative error and cosine of dW under packed activations, a row a net."""
    lines = []
    for row in (row for row in rows if "dW error" in row):
        cells = [f"{100 * error:.2g} %, {cosine:.5f}" for error, cosine in row["dW error"].values()]
        lines.append([row["net"], *cells])
    return markdown(("net", "8 bits: error, cosine", "2 bits: error, cosine"), lines)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    net: Annotated[list[str] | None, typer.Option(help="Only these nets.")] = None,
) -> None:
    """Count what lean modules keep and fill the tables of their README."""
    from trady_triton.bench.readme import fill

    console = wide_console()
    store = run(out, console, tuple(net or NETS))
    console.print(kept_table(list(store.rows.values())), highlight=False, soft_wrap=True, markup=False)
    if README.exists() and out == RESULTS and fill(README, out):
        console.print(f"{README}: tables written", highlight=False)


if __name__ == "__main__":
    typer.run(main)
