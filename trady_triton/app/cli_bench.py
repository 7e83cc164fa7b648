"""`trady bench`: a network of one's own, trained by every method, and what each takes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from trady_triton.app.build import build_model, check_name, input_size
from trady_triton.app.cli_base import check_file, command, note
from trady_triton.app.cli_options import Device, ImageSize
from trady_triton.app.planning import pick_device
from trady_triton.budget import parse_budget


@command
def bench(
    model: Annotated[str, typer.Option(help="A timm model name, such as mobilenetv2_100.")],
    batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 8,
    budget: Annotated[str, typer.Option(help="B_mem of the plans, in bytes: 256KiB.")] = "256KiB",
    image_size: ImageSize = None,
    methods: Annotated[str | None, typer.Option(help="Only these, with commas: full,pool-ckpt,trady.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Steps that are timed, each beside one of full.")] = 5,
    minutes: Annotated[float, typer.Option(min=0.0, help="Methods that do not start before are left out.")] = 30.0,
    device: Device = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run forward and loss under autocast in bfloat16.")] = False,
    out: Annotated[
        Path | None, typer.Option(callback=check_file, help="Keep the numbers in this JSON; a second run goes on.")
    ] = None,
) -> None:
    """Measure a training step of every method on a network: FLOPs, memory, time beside full fine-tuning."""
    from trady_triton.bench.methods import METHODS
    from trady_triton.bench.nets import Net
    from trady_triton.bench.runner import Case, Runner
    from trady_triton.bench.store import Store
    from trady_triton.bench.tables import show_steps, wide_console

    check_name(model)
    parse_budget(budget)
    where = pick_device(device).type
    chosen = [name for name, method in METHODS.items() if not method.is_costly]
    if methods:
        chosen = [name.strip() for name in methods.split(",")]
    unknown = [name for name in chosen if name not in METHODS]
    if unknown:
        raise ValueError(f"--methods {unknown[0]!r}: wanted some of {', '.join(METHODS)}")
    if not methods:  # there is one budget
        chosen = [name for name in chosen if name not in ("trady-small", "trady-large")]
    size = input_size(build_model(model, image_size=image_size), image_size)
    net = Net(model, batch, size, where, torch.bfloat16 if bf16 else None, channels_last=where == "cuda")
    cases = [Case(net, name, (budget,) * 3, repeats) for name in chosen]
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(out or Path(scratch) / "bench.json", where)
        with Runner(Console(stderr=True), minutes, model) as runner:
            runner.run([(store, case) for case in cases])
    show_steps(wide_console(), [store.rows[case.name] for case in cases])
    if out is not None:
        note(f"numbers written to {out}")
