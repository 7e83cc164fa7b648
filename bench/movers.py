"""The ops around the weight gradient, which only move bytes: compact store, packed activation, scattered update.

Each beside what plain training does in its place: an activation, a dense SGD step. Of the store that is nothing, as
plain training keeps a reference to its input; a copy of the whole input stands there to compare the rate of bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trady_triton.bench.layers import Layer, Work, drawn_channels, noise
from trady_triton.ops import act_pack, scatter_update_, sgd_hyper, store_channels, update_tables
from trady_triton.ops.act_pack import pack_bytes
from trady_triton.ops.scatter_update import update_bytes
from trady_triton.ops.store import traffic_bytes

LR = 0.1


def store(layer: Layer, batch: int, device: str, dtype: torch.dtype, seed: int = 0) -> Work:
    """The drawn channels of the input, against a copy of all of it."""
    x, channels = _input(layer, batch, device, dtype, seed)
    kind = "tokens" if layer.kind == "linear" else "pixels" if layer.is_product else "planes"
    tokens = x.numel() // layer.in_channels

    def sparse() -> Tensor:
        return store_channels(x, channels, kind)

    def error() -> float:
        wanted = (x.T if layer.kind == "linear" else x.movedim(1, 0).flatten(1))[channels]
        return float((sparse().flatten(1) - wanted).abs().max())

    nbytes = traffic_bytes(kind, layer.drawn, tokens, x.itemsize)
    return Work(error, sparse, x.clone, nbytes, 0, 2 * x.numel() * x.itemsize, 0)


def activation(layer: Layer, batch: int, device: str, dtype: torch.dtype, seed: int = 0) -> Work:
    """ReLU6 that packs its derivative into a bit an element, against ReLU6."""
    x, _ = _input(layer, batch, device, dtype, seed)

    def sparse() -> Tensor:
        return act_pack(x, "relu6", 1)[0]

    def error() -> float:
        return float((sparse() - F.relu6(x)).abs().max())

    nbytes = 2 * x.numel() * x.itemsize
    return Work(error, sparse, lambda: F.relu6(x), pack_bytes(x.numel(), x.itemsize, 1), 0, nbytes, 0)


def update(layer: Layer, batch: int, device: str, dtype: torch.dtype, seed: int = 0) -> Work:
    """SGD on the drawn channels of a float32 weight, against SGD on all of it."""
    generator = torch.Generator(device).manual_seed(seed)
    width, kernel = layer.in_channels // layer.groups, (layer.kernel,) * 2 if layer.kind == "conv" else ()
    weight = torch.randn(layer.out_channels, width, *kernel, generator=generator, device=device)
    dense_grad = torch.randn(weight.shape, generator=generator, device=device)
    compact = (layer.drawn, layer.out_channels // layer.groups, *kernel)
    grads = torch.randn(compact, generator=generator, device=device)
    channels = drawn_channels(layer, generator)
    hyper = torch.tensor([sgd_hyper(LR)], dtype=torch.float64)
    tables = update_tables([weight], [grads], [channels])  # once a draw, as the optimizer makes them

    def sparse() -> Tensor:
        scatter_update_([weight], [grads], [channels], hyper, tables=tables)
        return weight

    def error() -> float:
        before = weight.clone()
        moved = (before - sparse()).double() / LR
        view = moved.view(layer.groups, -1, width, *kernel).movedim(2, 1).flatten(0, 1)  # [C, O/G, ...]
        rest = view.abs().flatten(1).sum(1).index_fill(0, channels, 0).sum()
        return float((view[channels] - grads).abs().max() + rest)

    nbytes = update_bytes(grads.numel(), 4, 4, 0)
    return Work(error, sparse, lambda: weight.add_(dense_grad, alpha=-LR), nbytes, 0, 12 * weight.numel(), 0)


MOVERS: dict[str, Callable[..., Work]] = {"store": store, "activation": activation, "update": update}


def _input(layer: Layer, batch: int, device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    x = noise(layer, batch, layer.in_channels, layer.size, generator, dtype)
    return x, drawn_channels(layer, generator)
