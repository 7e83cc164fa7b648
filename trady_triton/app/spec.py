"""The grid of an experiment: networks x data sets x budgets x strategies x learning rates x seeds, from a YAML file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from trady_triton.models.schemes import scheme_of_budget
from trady_triton.strategies import strategy


@dataclass(frozen=True)
class Net:
    """A network: its timm name, more arguments of `timm.create_model`, a weights file, the image size."""

    name: str
    weights: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    ranking: str | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set: a file or folder, and how many images of each class are taken (None: all)."""

    file: str
    train_per_class: int | None = None
    test_per_class: int | None = None

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return Path(self.file).stem


@dataclass(frozen=True)
class Method:
    """A strategy and, under a name of its own, a learning rate instead of the grid's and options of `make_plan`."""

    name: str
    sampler: str
    lr: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """How every cell trains: SGD without momentum, linear warm-up from 0, then a cosine to 0, stepped per iteration.

    It is tested after the last epoch, and after every `test_every` epochs unless that is 0.
    """

    epochs: int
    warmup_epochs: float = 0
    batch_size: int = 32
    max_grad_norm: float | None = None
    test_every: int = 0


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `budget` is None for strategies without one."""

    net: Net
    data: DataSet
    budget: int | str | None
    method: Method
    lr: float
    seed: int
    protocol: Protocol

    @property
    def key(self) -> str:
        """A file name that says what the cell is; cells that differ in anything have different ones."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        budget = "none" if self.budget is None else self.budget
        return f"{self.net.name}-{self.data.name}-{budget}-{self.method.name}-lr{self.lr:g}-s{self.seed}-{digest}"


@dataclass(frozen=True)
class Spec:
    """A whole grid."""

    nets: tuple[Net, ...]
    data: tuple[DataSet, ...]
    budgets: tuple[int | str, ...]
    strategies: tuple[Method, ...]
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    protocol: Protocol

    @classmethod
    def load(cls, path: Path) -> Spec:
        """Read a YAML file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not YAML, or an entry is missing, unknown or of the wrong kind.
        """
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML ({error})") from error
        wanted = {entry.name for entry in fields(cls)}
        if not isinstance(content, dict) or set(content) != wanted:
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path}: wanted the entries {', '.join(sorted(wanted))}; found {found}")
        try:
            return cls(
                nets=tuple(Net(**entry) for entry in content["nets"]),
                data=tuple(DataSet(**entry) for entry in content["data"]),
                budgets=tuple(content["budgets"]),
                strategies=tuple(_method(entry) for entry in content["strategies"]),
                seeds=tuple(content["seeds"]),
                lrs=tuple(float(value) for value in content["lrs"]),
                protocol=Protocol(**content["protocol"]),
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: {error}") from error

    def cells(self) -> Iterator[Cell]:
        """Every run, seed by seed, so that a part of the grid is a whole comparison; each once.

        Raises:
            ValueError: Sparse Update is asked for at a budget for which no scheme was published.
        """
        for seed, net, data, lr in product(self.seeds, self.nets, self.data, self.lrs):
            for method in self.strategies:
                if method.lr is not None and lr != self.lrs[0]:
                    continue
                for budget in self.budgets if strategy(method.sampler).has_budget else (None,):
                    if strategy(method.sampler).layers == "scheme":
                        scheme_of_budget(net.name, budget)
                    yield Cell(net, data, budget, method, method.lr or lr, seed, self.protocol)


def _method(entry: Any) -> Method:
    if isinstance(entry, str):
        strategy(entry)
        return Method(entry, entry)
    options = dict(entry)
    name, sampler = options.pop("name"), options.pop("sampler")
    strategy(sampler)
    return Method(name, sampler, options.pop("lr", None), options)
