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
from torch import Tensor, nn

import trady_triton.models  # noqa: F401  teaches timm's types
from trady_triton import Plan, Policy, choose_recompute
from trady_triton.bench.config import RESULTS
from trady_triton.bench.store import Store
from trady_triton.bench.tables import markdown, wide_console
from trady_triton.cost import CostModel, LayerShape, measure_call
from trady_triton.meters import KeptBytes, peak_memory
from trady_triton.ranking import find_head
from trady_triton.registry import is_trainable
from trady_triton.rehearsal import fake_copy, train_under

README = Path("trady_triton/nn/README.md")
SHAPE = (8, 3, 224, 224)
# Net -> the parts of the batch in which a recomputed block runs; those whose peak is counted as well.
PEAKS = {
    "mobilenetv2_100": 1,
    "tf_efficientnet_lite0": 1,
    "resnet50": 1,
    "efficientnet_b0": 1,
    "swin_tiny_patch4_window7_224": 1,
    "convnext_tiny": 1,
    "vit_small_patch16_224": 2,
}
NETS = (
    "mobilenetv2_035", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv4_conv_small", "mnasnet_100",
    "tf_efficientnet_lite0", "efficientnet_b0", "fbnetc_100", "ghostnet_100", "resnet18", "resnet50", "regnety_008",
    "densenet121", "vgg11_bn", "convnext_tiny", "convnextv2_atto", "vit_tiny_patch16_224", "vit_small_patch16_224",
    "vit_base_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "mobilevit_s", "efficientvit_b0",
    "mixer_s16_224", "poolformer_s12", "eva02_tiny_patch14_224", "maxvit_tiny_tf_224", "coatnet_0_rw_224",
)  # fmt: skip


def run(out: Path = RESULTS, console: Console | None = None, nets: tuple[str, ...] = NETS) -> Store:
    """Count what the store does not hold yet."""
    console = console or Console()
    store = Store(out / "lean.json", "cpu")
    for name in track(nets, "lean modules", console=console, disable=not console.is_terminal):
        inputs = {"net": name, "batch": 2 if name.startswith("vit_base") else SHAPE[0]}
        if not store.is_done(name, inputs):
            store.put(name, inputs, {**inputs, "status": "ok", **count(name, inputs["batch"])})
    return store


def count(name: str, batch: int) -> dict[str, Any]:
    """Bytes kept of each way to train, and peaks of a step for the nets of `PEAKS`."""
    torch.manual_seed(0)
    model, shape, has_peak = timm.create_model(name), (batch, *SHAPE[1:]), name in PEAKS
    plan = plan_at(model, shape, 0.25)
    lean = choose_recompute(replace(plan, policy=Policy(recompute_parts=PEAKS.get(name, 1))), model, shape)
    packed = choose_recompute(replace(plan, policy=Policy(activations=8, attention="recompute")), model, shape)
    row = {
        "full": step_bytes(model, None, shape, has_peak),
        "lean": step_bytes(model, lean, shape, has_peak),
        "8 bits": step_bytes(model, packed, shape),
        "inference": inference_bytes(model, shape) if has_peak else None,
        "recomputed": len(lean.policy.recompute),
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
    return row


def plan_at(model: nn.Module, shape: tuple[int, ...], depth: float) -> Plan:
    """A plan of two channels of the layer at this depth (0 the first, 1 the last), gates and grouped ones aside."""
    shapes: dict[str, LayerShape] = {}
    with fake_copy(model) as twin, torch.no_grad():
        for name, module in twin.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and is_trainable(type(module)):
                module.register_forward_hook(_recorder(name, shapes, shape[0]))
        twin.eval()(torch.empty(shape))
    head = find_head(model, list(shapes))
    shapes = {name: sizes for name, sizes in shapes.items() if not name.startswith(head)}
    usual = [name for name, sizes in shapes.items() if sizes.groups == 1 and sizes.in_positions > 1]
    pool = (usual[int(depth * (len(usual) - 1))],)
    cost = CostModel(shape[0], 4, 4, unit="bytes")
    return Plan(shapes, pool, head, 2 * cost.channel_cost(shapes[pool[0]]), cost)


def _recorder(name: str, shapes: dict[str, LayerShape], batch: int) -> Any:
    def record(module: nn.Conv2d | nn.Linear, args: tuple[Tensor, ...], y: Tensor) -> None:
        shapes[name] = measure_call(module, args[0], y, batch)

    return record


def step_bytes(model: nn.Module, plan: Plan | None, shape: tuple[int, ...], has_peak: bool = False) -> dict[str, int]:
    """Bytes kept by a forward and, if asked for, the peak of forward and backward, beyond weights and batch."""
    channels = {} if plan is None else dict.fromkeys(plan.pool, (0, 1))
    with fake_copy(model) as twin:
        train_under(twin, plan, channels)
        twin.eval()
        x, y = torch.empty(shape), torch.empty(shape[0], dtype=torch.int64)
        with KeptBytes(twin) as kept:
            loss = F.cross_entropy(twin(x), y)
        del loss
        if not has_peak:
            return {"kept": kept.total}
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
    columns = ("net", "inference", "full fine-tuning", "lean, exact", "lean / inference", "parts of a recomputed block")
    lines = []
    for row in (row for row in rows if row["inference"]):
        peaks = [row["inference"], row["full"]["peak"], row["lean"]["peak"]]
        ratio = f"{row['lean']['peak'] / row['inference']:.2f}"
        lines.append([row["net"], *(f"{peak / 2**20:.1f}" for peak in peaks), ratio, str(row["parts"])])
    return markdown(columns, lines)


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
