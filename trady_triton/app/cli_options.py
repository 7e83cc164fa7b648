"""Options that several commands of `trady` have: each is defined here, once, and a group of them is a dataclass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from trady_triton import Plan, Ranking, choose_recompute, make_plan
from trady_triton.app.build import build_model, check_name, input_size, load_weights, parse_options
from trady_triton.app.cli_base import check_file, note
from trady_triton.app.planning import load_ranking, parse_budget_option
from trady_triton.budget import parse_budget
from trady_triton.models import how_made, ranking_for
from trady_triton.strategies import STRATEGIES, Strategy, strategy

_DRAWN = [name for name, kind in STRATEGIES.items() if kind.is_self_contained]

DataFolder = Annotated[Path, typer.Option(help="Folder to which the files named in the grid are relative.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; a GPU by default where there is one.")]
ImageSize = Annotated[int | None, typer.Option(min=8, help="Input height and width; the model's own by default.")]
OutFile = Annotated[Path | None, typer.Option(callback=check_file, help="Write the result here, as JSON.")]
PlotFile = Annotated[Path | None, typer.Option(callback=check_file, help="Draw the result into this PNG.")]


@dataclass(frozen=True)
class Network:
    """A network of timm's and the weights that it starts from."""

    net: Annotated[str, typer.Argument(help="A timm model name, such as mobilenetv2_100.", show_default=False)]
    weights: Annotated[str | None, typer.Option(help="Weights to start from: a .safetensors file or a torch file.")] = (
        None
    )
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from timm's weights, which it downloads.")] = (
        False
    )
    model_args: Annotated[
        str | None, typer.Option(help='More for timm.create_model, as JSON: {"pad_type": "same"}.')
    ] = None
    image_size: ImageSize = None
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything that is random.")] = 0

    def __post_init__(self) -> None:
        check_name(self.net)
        if self.weights and self.pretrained:
            raise ValueError("--weights and --pretrained: only one of them")

    def build(self, num_classes: int | None = None, *, with_weights: bool = True) -> nn.Module:
        """The network, its random weights seeded; with its own number of classes unless told."""
        torch.manual_seed(self.seed)
        model = build_model(
            self.net,
            num_classes=num_classes,
            image_size=self.image_size,
            pretrained=self.pretrained and with_weights,
            options=parse_options(self.model_args),
        )
        if self.weights and with_weights:
            fresh = load_weights(model, self.weights)
            note(f"{self.weights}: loaded" + (f"; not in the file, so random: {', '.join(fresh)}" if fresh else ""))
        return model

    def size(self, model: nn.Module) -> int:
        """Height and width of its inputs."""
        return input_size(model, self.image_size)


@dataclass(frozen=True)
class Planning:
    """What a plan is made of: options of `make_plan`, and where its ranking comes from."""

    budget: Annotated[
        str | None, typer.Option(help="Elements for one sample (27946), or bytes for a batch (256KiB).")
    ] = None
    ranking: Annotated[str | None, typer.Option(help="A ranking of `trady rank --out`.")] = None
    cost_model: Annotated[str, typer.Option(help="exact, or paper: depthwise channels cost 1 weight.")] = "exact"
    k: Annotated[int | None, typer.Option("--k", help="Layers in the pool, instead of --coverage.")] = None
    coverage: Annotated[
        float | None, typer.Option(help="Share of the summed RGN that the pool must hold; for trady 0.976.")
    ] = None
    sampler: Annotated[str, typer.Option(help=f"Which strategy draws the channels: {', '.join(_DRAWN)}.")] = "trady"
    dgrad_budget: Annotated[
        float | None,
        typer.Option(help="Draw the depth too: largest expected share of full fine-tuning's dX FLOPs."),
    ] = None
    fill: Annotated[
        str, typer.Option(help="A channel that does not fit ends the draw (stop) or is left out (skip).")
    ] = "stop"
    store: Annotated[
        str, typer.Option(help="Keep drawn channels as they are (same), or in int8 or int4: more fit.")
    ] = "same"
    recompute: Annotated[
        bool, typer.Option(help="Run blocks again in the backward where that spares enough memory: exact.")
    ] = True
    optimizer: Annotated[str, typer.Option(help="sgd (the paper's), momentum (0.9) or adamw.")] = "sgd"

    def __post_init__(self) -> None:
        if self.k is not None and self.coverage is not None:
            raise ValueError("--k and --coverage: only one of them")
        if self.budget is not None:
            parse_budget(parse_budget_option(self.budget))

    @property
    def strategy(self) -> Strategy:
        """The strategy of that name, which the command can run.

        Raises:
            ValueError: there is none, or it needs more than a plan.
        """
        chosen = strategy(self.sampler)
        if self.sampler not in _DRAWN:
            raise ValueError(f"--sampler {self.sampler}: needs passes or a scheme of its own; "
                             "`trady experiment` runs it")  # fmt: skip
        return chosen

    def check_budget(self, other: str, given: bool) -> None:
        """Raises ValueError unless the budget or the `other` option is given, or neither where none is wanted."""
        wanted = self.strategy.has_budget
        if (self.budget is not None) + given != wanted:
            raise ValueError(f"--budget and {other}: wanted {'one' if wanted else 'none'} of them for --sampler "
                             f"{self.sampler}")  # fmt: skip

    def changed(self) -> list[str]:
        """The options that say something of the plan and are not at their defaults, as they are typed."""
        return [f"--{field.name.replace('_', '-')}" for field in fields(self)
                if field.name != "optimizer" and getattr(self, field.name) != field.default]  # fmt: skip

    def make(self, ranking: Ranking, model: nn.Module, size: int, batch_size: int, seed: int) -> Plan:
        """A plan for the budget."""
        amount = None if self.budget is None else parse_budget_option(self.budget)
        made = make_plan(ranking, budget=amount, batch_size=batch_size, **self.options(seed))
        return choose_recompute(made, model, (batch_size, 3, size, size)) if self.recompute else made

    def options(self, seed: int) -> dict[str, Any]:
        """Those of `make_plan` beside the budget."""
        names = ("cost_model", "k", "coverage", "sampler", "dgrad_budget", "fill", "store", "optimizer")
        return {name: getattr(self, name) for name in names} | {"seed": seed}

    def known_ranking(self, model: nn.Module, size: int) -> Ranking | None:
        """The ranking of the file, or the one that comes with the library for this network, with a word about it."""
        if self.ranking:
            return load_ranking(self.ranking, model, size)
        shipped: Ranking | None = ranking_for(model, size)
        if shipped is not None:
            note(f"{how_made(model, size)}; --ranking takes another")
        return shipped
