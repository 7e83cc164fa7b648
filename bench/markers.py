"""Text between markers in Markdown files: `<!-- KIND:NAME -->` ... `<!-- /KIND -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable


def fill_blocks(text: str, kind: str, names: Iterable[str], make: Callable[[str], str | None]) -> str:
    """The text with what `make(name)` says between the markers of a kind; where it says None all stays as it is.

    Raises:
        ValueError: a marker that is not one of `names`.
    """
    known = tuple(names)

    def block(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise ValueError(f"marker {kind}:{match[1]}: wanted one of {', '.join(known)}")
        content = make(match[1])
        return match[0] if content is None else f"<!-- {kind}:{match[1]} -->\n\n{content}\n\n<!-- /{kind} -->"

    return re.sub(rf"<!-- {kind}:(\w+) -->\n.*?<!-- /{kind} -->", block, text, flags=re.DOTALL)
