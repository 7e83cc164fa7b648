"""The grid of an experiment: networks x data sets x budgets x strategies x learning rates x seeds, from a YAML file."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]

from trady_triton.app.build import check_name
from trady_triton.budget import parse_budget
from trady_triton.budget_plan import make_plan
from trady_triton.models.schemes import scheme_of_budget
from trady_triton.strategies import strategy

T = TypeVar("T")


@dataclass(frozen=True)
class Net:
    """A network: its timm name, more arguments of `timm.create_model`, a weights file, the image size."""

    name: str
    weights: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    ranking: str | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None:
            _check_count("image_size", self.image_size)
        if not isinstance(self.args, Mapping):
            raise ValueError(f"args {self.args!r}: wanted a mapping, such as {{pad_type: same}}")


@dataclass(frozen=True)
class DataSet:
    """A data set: a file or folder, and how many images of each class are taken (None: all)."""

    file: str
    train_per_class: int | None = None
    test_per_class: int | None = None

    def __post_init__(self) -> None:
        for name in ("train_per_class", "test_per_class"):
            if (count := getattr(self, name)) is not None:
                _check_count(name, count)

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

    def __post_init__(self) -> None:
        _check_count("epochs", self.epochs)
        _check_count("batch_size", self.batch_size)
        _check_count("test_every", self.test_every, least=0)
        _number("warmup_epochs", self.warmup_epochs)
        if self.max_grad_norm is not None:
            _number("max_grad_norm", self.max_grad_norm)


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
        try:
            return _entry(cls, content, nets=_nets, data=_data, budgets=_budgets, strategies=_methods,
                          seeds=_seeds, lrs=_lrs, protocol=partial(_entry, Protocol))  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def check_files(self, folder: Path) -> None:
        """Raises FileNotFoundError, before anything is trained, where a file that the grid names is not in `folder`."""
        files = [file for net in self.nets for file in (net.weights, net.ranking) if file]
        files += [data.file for data in self.data if data.file != "digits"]
        for file in files:
            if not (folder / file).exists():
                raise FileNotFoundError(f"{folder / file}: no such file; --data names the folder of the grid's files")

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


def _entry(kind: type[T], content: Any, **readers: Callable[[Any], Any]) -> T:
    """An object from a mapping of its fields, some of them read by a function of their own.

    Raises:
        ValueError: no mapping, a field is missing or unknown, or one is of the wrong kind.
    """
    names = [own.name for own in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(content, dict):
        raise ValueError(f"{kind.__name__} {content!r}: wanted entries {', '.join(names)}")
    needed = [own.name for own in fields(kind) if own.default is MISSING and own.default_factory is MISSING]  # type: ignore[arg-type]
    strange = [f"{name!r} is unknown" for name in content if name not in names]
    strange += [f"{name!r} is missing" for name in needed if name not in content]
    if strange:
        raise ValueError(f"{kind.__name__}: {strange[0]}; wanted entries {', '.join(names)}")
    return kind(**{name: readers[name](value) if name in readers else value for name, value in content.items()})


def _each(name: str, read: Callable[[Any], T], content: Any) -> tuple[T, ...]:
    if not isinstance(content, list) or not content:
        raise ValueError(f"{name} {content!r}: wanted a list of at least one")
    return tuple(read(entry) for entry in content)


def _method(entry: Any) -> Method:
    options = dict(entry) if isinstance(entry, dict) else {"name": entry, "sampler": entry}
    if not {"name", "sampler"} <= options.keys():
        raise ValueError(f"strategy {entry!r}: wanted a name, or name, sampler, and more for make_plan")
    name, sampler, lr = options.pop("name"), options.pop("sampler"), options.pop("lr", None)
    strategy(sampler)
    unknown = options.keys() - inspect.signature(make_plan).parameters.keys()
    if unknown:
        raise ValueError(f"strategy {name!r}: make_plan has no option {min(unknown)!r}")
    return Method(name, sampler, None if lr is None else _number("lr", lr), options)


def _net(entry: Any) -> Net:
    net = _entry(Net, entry)
    check_name(net.name)
    return net


def _budget(entry: Any) -> int | str:
    parse_budget(entry)
    budget: int | str = entry
    return budget


def _seed(entry: Any) -> int:
    _check_count("seed", entry, least=0)
    seed: int = entry
    return seed


def _number(name: str, entry: Any) -> float:
    if isinstance(entry, bool) or not isinstance(entry, int | float) or not 0 <= entry < math.inf:
        hint = "; YAML takes 1e-3 for text, and 1.0e-3 for a number" if isinstance(entry, str) else ""
        raise ValueError(f"{name} {entry!r}: wanted a finite number of at least 0{hint}")
    return float(entry)


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} {value!r}: wanted an integer of at least {least}")


_nets, _data = partial(_each, "nets", _net), partial(_each, "data", partial(_entry, DataSet))
_budgets, _methods = partial(_each, "budgets", _budget), partial(_each, "strategies", _method)
_seeds, _lrs = partial(_each, "seeds", _seed), partial(_each, "lrs", partial(_number, "lr"))
