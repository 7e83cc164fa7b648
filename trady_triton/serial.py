"""Files that are written whole or not at all, and JSON files that say what they hold."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VERSION = 1


@contextmanager
def written_whole(path: str | os.PathLike[str], *, keep: str | None = None) -> Iterator[Path]:
    """A scratch file that takes the place of `path` when the block ends.

    Whatever happens, a crash of the machine included, `path` is the older file or the whole new one. With `keep`, a
    suffix such as ".previous", the older file stays beside the new one under that name.
    """
    target = Path(path)
    scratch = target.with_name(target.name + ".part")
    try:
        scratch.touch()
        mode = scratch.stat().st_mode
        yield scratch
        scratch.chmod(mode)  # safetensors makes files that nobody else can read
        _flush(scratch)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    if keep is not None and target.exists():
        os.replace(target, target.with_name(target.name + keep))
    os.replace(scratch, target)
    if os.name == "posix":
        _flush(target.parent)


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], kind: str, content: dict[str, Any]) -> None:
    """Write `content` as a `kind` file; an interrupted write leaves the older file as it was."""
    text = json.dumps({"format": f"trady_triton.{kind}", "version": VERSION, **content}, indent=1) + "\n"
    with written_whole(path) as scratch:
        scratch.write_text(text)


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
