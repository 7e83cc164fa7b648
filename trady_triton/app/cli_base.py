"""What the commands of `trady` share: how options are grouped, remarks, files that are checked before the work."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_type_hints

import typer.main
from typer.core import TyperCommand

P = ParamSpec("P")
R = TypeVar("R")


def command(function: Callable[..., None]) -> TyperCommand:
    """Make a function a command, with groups of options expanded."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command()(expanded(function))
    made = typer.main.get_command(alone)
    assert isinstance(made, TyperCommand)
    return made


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
