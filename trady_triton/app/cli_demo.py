"""`trady demo`: what `make demo` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trady_triton.app.cli_base import check_folder, command


@command
def demo(
    out: Annotated[Path, typer.Option(callback=check_folder, help="Folder for the plots and the numbers.")] = Path(
        "demo-output"
    ),
) -> None:
    """Fine-tune a pretrained EfficientNet-Lite0 on handwritten digits: whole, its head, TraDy at two budgets."""
    from trady_triton.app.demo import run

    run(out)
