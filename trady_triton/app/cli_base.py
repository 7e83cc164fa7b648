"""What the commands of `trady` share: the application, how options are grouped, how mistakes are told."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, get_type_hints

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup


class Commands(TyperGroup):
    """Turns what the user can mend into one line on stderr and exit code 1; Ctrl-C gives 130.

    A RuntimeError is torch's word for most of that: no memory left, a full disk, an input too small for a network. It
    may be a mistake of ours as well, so its line says how to see the traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # RuntimeErrors as well
            raise
        except (ValueError, OSError, RuntimeError, MemoryError, SafetensorError) as error:
            if ctx.params["traceback"]:
                raise
            typer.echo("error: " + _told(error), err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    told = " ".join(str(error).split()) or type(error).__name__
    return told + " (`trady --traceback ...` shows where)" * isinstance(error, RuntimeError)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

P = ParamSpec("P")
R = TypeVar("R")


def command(function: Callable[P, R]) -> Callable[..., R]:
    """Make a function a command, with groups of options expanded."""
    return app.command()(expanded(function))


def expanded(function: Callable[P, R]) -> Callable[..., R]:
    """Show the fields of arguments that are dataclasses as options of their own; the function gets the objects."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        parameters += _options(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]

    @functools.wraps(function)
    def wrapper(**options: Any) -> R:
        for name, group in groups.items():
            options[name] = group(**{field.name: options.pop(field.name) for field in fields(group)})
        return function(**options)  # type: ignore[call-arg]

    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    wrapper.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def _options(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def note(text: str) -> None:
    """A remark on stderr, so that stdout holds results only."""
    typer.echo(text, err=True)


def check_file(path: Path | None) -> Path | None:
    """Refuse a file that could not be written, before the work that it is for."""
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder, wanted a file")
    if path is not None and not path.parent.exists():
        raise typer.BadParameter(f"there is no folder {path.parent}")
    check_folder(path and path.parent)
    return path


def check_folder(path: Path | None) -> Path | None:
    """Refuse a folder that could not be made or written to."""
    if path is not None:
        nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise typer.BadParameter(f"{nearest} is {'not writable' if nearest.is_dir() else 'a file, not a folder'}")
    return path


def _show_version(asked: bool) -> None:
    if asked:
        print(", ".join(f"{name} {version(name)}" for name in ("trady-triton", "torch", "timm")))
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    """Fine-tune pretrained networks inside a strict memory budget (TraDy)."""
