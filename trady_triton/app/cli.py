"""The `trady` command. A subcommand is imported when it is called, as timm and what it brings take seconds to load."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperCommand, TyperGroup

# The first line of each docstring. `load` finds the module.
COMMANDS = {
    "rank": "Rank the layers of a network by their reweighted gradient norm (RGN).",
    "plan": "Show what a memory budget buys: costs, pool, expected draws and savings.",
    "finetune": "Fine-tune a network on labelled images inside a memory budget, or whole, or the head alone.",
    "export": "Write what a run changed as a small file; name the weights and options that it started from.",
    "apply": "Make the full weights from a delta and the weights that its run started from.",
    "bench": "Measure a training step of every method on a network: FLOPs, memory, time beside full fine-tuning.",
    "experiment": "Run a grid of nets x data sets x budgets x strategies x seeds; a second call runs what is left.",
    "study": "Measure what the paper measures: tails, rankings of layers and channels, coverage, who beats whom.",
    "demo": "Fine-tune a pretrained EfficientNet-Lite0 on handwritten digits: whole, its head, TraDy at two budgets.",
}


class Later(TyperCommand):
    """A command that is known by its name and help until it is called."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """The context of the command itself."""
        return load(str(self.name)).make_context(info_name, args, parent, **extra)


class Commands(TyperGroup):
    """Turns what the user can mend into one line on stderr and exit code 1; Ctrl-C gives 130.

    A RuntimeError is torch's word for most of that: no memory left, a full disk, an input too small for a network; an
    AssertionError is timm's for an input of a wrong size. Either may be a mistake of ours as well, so its line says how
    to see the traceback.
    """

    def __init__(self, **options: Any) -> None:
        options["commands"] = {name: Later(name, help=told) for name, told in COMMANDS.items()}
        super().__init__(**options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # RuntimeErrors the first two, an OSError the last
            raise
        except (ValueError, OSError, RuntimeError, AssertionError, MemoryError, SafetensorError) as error:
            if ctx.params["traceback"]:
                raise
            typer.echo("error: " + _told(error), err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error


def load(name: str) -> TyperCommand:
    """Import a command: from a module of its name, but `export` and `apply` share one."""
    module = "delta" if name in ("export", "apply") else name
    command: TyperCommand = getattr(import_module(f"trady_triton.app.cli_{module}"), name)
    return command


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    told = " ".join(str(error).split()) or type(error).__name__
    return told + " (`trady --traceback ...` shows where)" * isinstance(error, RuntimeError | AssertionError)


def _show_version(asked: bool) -> None:
    if asked:
        print(", ".join(f"{name} {version(name)}" for name in ("trady-triton", "torch", "timm")))
        raise typer.Exit()


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    """Fine-tune pretrained networks inside a strict memory budget (TraDy)."""


def main() -> None:
    """Entry point of the `trady` command."""
    app()
