"""Runs of a chain: consecutive links of a Sequential that keep the first one's input alone, as one unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from trady_triton.nn.recompute import run_recomputed
from trady_triton.policy import Policy
from trady_triton.registry import lean_type

Run = tuple[int, int]


class Chain(nn.Module):
    """A module that calls its links one after another, each on what the last one returned.

    `runs` are pairs (i, j), in order: links i to j - 1 are recomputed as one.
    """

    policy: Policy = Policy()
    runs: tuple[Run, ...] = ()

    def links(self) -> list[nn.Module]:
        """The modules in the order of their calls."""
        raise NotImplementedError

    def call_links(self, x: Tensor) -> Tensor:
        """All links, run by run."""
        links, at = self.links(), 0
        for start, stop in self.runs:
            x = _call_all(links[at:start], x)
            x = run_recomputed(self, partial(_call_all, links[start:stop]), x)
            at = stop
        return _call_all(links[at:], x)


class LeanSequential(Chain, nn.Sequential):
    """nn.Sequential with runs."""

    def links(self) -> list[nn.Module]:
        """Every child; one that stands twice is called twice."""
        return list(self)

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Sequential."""
        return self.call_links(input)


def links_of(module: nn.Module) -> list[nn.Module]:
    """The links of a module whose type is a taught chain, lean already or not yet; none of another."""
    kind = type(module) if isinstance(module, Chain) else lean_type(type(module))
    return kind.links(module) if kind is not None and issubclass(kind, Chain) else []  # type: ignore[arg-type]


def run_name(chain: str, start: int, stop: int) -> str:
    """What a policy calls links start to stop - 1 of the chain of that name: "blocks.4:10"."""
    return f"{chain}.{start}:{stop}".removeprefix(".")


def find_runs(names: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, tuple[Run, ...]]:
    """Chain -> its runs, out of those names that are no module's.

    Raises:
        ValueError: a name is neither a module's nor a run's, or two runs overlap.
    """
    found: dict[str, list[Run]] = {}
    for name in names:
        if name not in modules:
            chain, _, ends = name.rpartition(".")
            found.setdefault(chain, []).append(_parse(name, ends, len(links_of(modules.get(chain, nn.Identity())))))
    for chain, runs in found.items():
        runs.sort()
        for (_, stop), (start, _) in pairwise(runs):
            if start < stop:
                raise ValueError(f"recompute: runs of {chain or 'the model'!r} overlap at its link {start}")
    return {chain: tuple(runs) for chain, runs in found.items()}


def _parse(name: str, ends: str, length: int) -> Run:
    start, colon, stop = ends.partition(":")
    if not colon or not length:
        raise ValueError(f"recompute {name!r}: the model has no module of that name")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop) <= length):
        raise ValueError(f"recompute {name!r}: wanted 'i:j' with 0 <= i < j <= {length}")
    return int(start), int(stop)


def _call_all(links: Sequence[nn.Module], x: Tensor) -> Tensor:
    for link in links:
        x = link(x)
    return x
