"""Arguments of the wrong kind, told at the public doors and not by an attribute that is missing further in."""

from __future__ import annotations

from typing import Any


def expect(name: str, value: Any, kind: type, hint: str = "") -> None:
    """Raises TypeError, which says what came and what was wanted, unless the value is of that kind."""
    if not isinstance(value, kind):
        wanted = f"{name} of type {type(value).__name__}: wanted a {kind.__name__}"
        raise TypeError(f"{wanted}, {hint}" if hint else wanted)
