"""The `trady` command: each module `cli_NAME` adds commands to `app`, in this order."""

from __future__ import annotations

from importlib import import_module

from trady_triton.app.cli_base import app

for _name in ("rank", "plan", "finetune", "delta", "bench", "experiment", "study", "demo"):
    import_module(f"trady_triton.app.cli_{_name}")


def main() -> None:
    """Entry point of the `trady` command."""
    app()
