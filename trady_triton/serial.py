"""JSON files that say what they hold, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VERSION = 1


def write_json(path: str | os.PathLike[str], kind: str, content: dict[str, Any]) -> None:
    """Write `content` as a `kind` file; an interrupted write leaves the older file as it was."""
    target = Path(path)
    scratch = target.with_name(target.name + ".part")
    scratch.write_text(json.dumps({"format": f"trady_triton.{kind}", "version": VERSION, **content}, indent=1) + "\n")
    os.replace(scratch, target)


def read_json(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read a file of `write_json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or not a `kind` file of this version.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a {kind} file, the JSON cannot be read ({error})") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != f"trady_triton.{kind}":
        raise ValueError(f"{path}: wanted a file of format 'trady_triton.{kind}', got {found!r}")
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: {kind} version {content.get('version')!r}, this library reads version {VERSION}")
    return {key: value for key, value in content.items() if key not in ("format", "version")}
