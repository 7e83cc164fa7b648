"""What the commands of `trady` share: the application, its options, how mistakes are told, the network asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

import torch
import typer
from torch import nn

from trady_triton import Ranking
from trady_triton.app.build import build_model, load_weights, parse_options
from trady_triton.app.planning import rank_on_noise
from trady_triton.models import how_made, ranking_for

app = typer.Typer(
    help="Fine-tune pretrained networks inside a strict memory budget (TraDy).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

P = ParamSpec("P")
R = TypeVar("R")

Net = Annotated[str, typer.Argument(help="A timm model name, such as mobilenetv2_100.", show_default=False)]
Weights = Annotated[str | None, typer.Option(help="Weights to start from: a .safetensors file or a torch file.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Start from timm's weights, which it downloads.")]
ModelArgs = Annotated[str | None, typer.Option(help='More for timm.create_model, as JSON: {"pad_type": "same"}.')]
ImageSize = Annotated[int | None, typer.Option(min=8, help="Input height and width; the model's own by default.")]
RankingFile = Annotated[str | None, typer.Option("--ranking", help="A ranking of `trady rank --out`.")]
Budget = Annotated[str | None, typer.Option(help="Elements for one sample (27946), or bytes for a batch (256KiB).")]
CostModelName = Annotated[str, typer.Option("--cost-model", help="exact, or paper: depthwise channels cost 1 weight.")]
PoolSize = Annotated[int | None, typer.Option("--k", help="Layers in the pool, instead of --coverage.")]
Coverage = Annotated[
    float | None,
    typer.Option(help="Share of the summed RGN that the pool must hold; for trady 0.976."),
]
Sampler = Annotated[str, typer.Option(help="Which strategy draws the channels: trady, d-full, cyclic, weighted, ...")]
DgradBudget = Annotated[
    float | None,
    typer.Option("--dgrad-budget", help="Draw the depth too: largest expected share of full fine-tuning's dX FLOPs."),
]
Fill = Annotated[str, typer.Option(help="A channel that does not fit ends the draw (stop) or is left out (skip).")]
Store = Annotated[str, typer.Option(help="Keep drawn channels as they are (same), or in int8 or int4: more fit.")]
Recompute = Annotated[bool, typer.Option(help="Run blocks again in the backward where that keeps half or less: exact.")]
OptimizerName = Annotated[str, typer.Option("--optimizer", help="sgd (the paper's), momentum (0.9) or adamw.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random.")]


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """Turn a user's mistake into one line on stderr and exit code 1; Ctrl-C gives 130."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            typer.echo("error: " + " ".join(str(error).split()), err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error

    return wrapper


def prepare(
    net: str,
    weights: str | None,
    pretrained: bool,
    model_args: str | None,
    image_size: int | None,
    seed: int,
    num_classes: int | None = None,
) -> nn.Module:
    """The network that the options ask for, its random weights seeded."""
    if weights and pretrained:
        raise ValueError("--weights and --pretrained: only one of them")
    torch.manual_seed(seed)
    options = parse_options(model_args)
    model = build_model(net, num_classes=num_classes, image_size=image_size, pretrained=pretrained, options=options)
    if weights:
        fresh = load_weights(model, weights)
        note(f"{weights}: loaded" + (f"; not in the file, so random: {', '.join(fresh)}" if fresh else ""))
    return model


def quick_ranking(model: nn.Module, image_size: int, batch_size: int, steps: int, seed: int) -> Ranking:
    """A ranking on noise, and a word about it on stderr."""
    note(f"no data or ranking given: a quick ranking on {steps} x {batch_size} random images and labels, seed {seed}")
    return rank_on_noise(model, image_size, batch_size=batch_size, steps=steps, seed=seed)


def shipped_ranking(model: nn.Module, image_size: int) -> Ranking | None:
    """The ranking that comes with the library for this network, and a word about it on stderr; or None."""
    ranking: Ranking | None = ranking_for(model, image_size)
    if ranking is not None:
        note(f"{how_made(model, image_size)}; --ranking takes another")
    return ranking


def note(text: str) -> None:
    """A remark on stderr, so that stdout holds results only."""
    typer.echo(text, err=True)
