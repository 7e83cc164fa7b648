"""Real layers of the zoo, and the weight gradient of each in three ways: our kernels, their torch twins, dense.

Shapes: N batch, C input channels, O output channels, K drawn channels, H = W size of the input, P output size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor

from trady_triton.ops import conv_wgrad, grouped_wgrad, store_channels, token_wgrad
from trady_triton.ops.conv_wgrad import conv_wgrad_bytes
from trady_triton.ops.grouped_wgrad import grouped_wgrad_bytes
from trady_triton.ops.token_wgrad import token_wgrad_bytes


@dataclass(frozen=True)
class Layer:
    """A Conv2d or Linear, and how many of its input channels a draw of 1/16 (at least 8) trains."""

    name: str
    kind: str
    in_channels: int
    out_channels: int
    size: int
    kernel: int
    stride: int
    groups: int
    drawn: int

    @property
    def is_product(self) -> bool:
        """Whether dW is a matrix product over tokens."""
        return self.kind == "linear" or self.kernel == 1

    @property
    def out_size(self) -> int:
        """Height and width of the output; padding keeps the size but for the stride."""
        return -(-self.size // self.stride)


@dataclass(frozen=True)
class Work:
    """An op ready to run: `sparse()` on drawn channels, and `dense()`, what plain training does in its place.

    `error()` says how far the first is from right. The bytes and FLOPs are what perfect kernels move and compute.
    """

    error: Callable[[], float]
    sparse: Callable[[], Tensor]
    dense: Callable[[], Tensor]
    sparse_bytes: int
    sparse_flops: int
    dense_bytes: int
    dense_flops: int


def layers() -> list[Layer]:
    """What shapes.json holds."""
    return [Layer(**entry) for entry in json.loads((files("trady_triton.bench") / "shapes.json").read_text())]


def work(layer: Layer, batch: int, device: str, dtype: torch.dtype, seed: int = 0) -> Work:
    """Inputs of a layer on a device, and its weight gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    channels = drawn_channels(layer, generator)
    x = noise(layer, batch, layer.in_channels, layer.size, generator, dtype)
    dy = noise(layer, batch, layer.out_channels, layer.out_size, generator, dtype)
    if layer.kind == "linear":
        return _linear(layer, x, dy, channels)
    return _product(layer, x, dy, channels) if layer.is_product else _conv(layer, x, dy, channels)


def noise(layer: Layer, batch: int, channels: int, size: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """An input or output of the layer, [N * size^2, channels] or [N, channels, size, size], on the generator's device.

    On a GPU images are channels_last, as the nets there are.
    """
    if layer.kind == "linear":
        return torch.randn(batch * size**2, channels, generator=generator, device=generator.device).to(dtype)
    images = torch.randn(batch, channels, size, size, generator=generator, device=generator.device).to(dtype)
    return images.contiguous(memory_format=torch.channels_last) if images.is_cuda else images


def drawn_channels(layer: Layer, generator: torch.Generator) -> Tensor:
    """Ids of a draw, ascending, on the generator's device."""
    ids = torch.randperm(layer.in_channels, generator=generator, device=generator.device)
    return ids[: layer.drawn].sort().values


def _linear(layer: Layer, x: Tensor, dy: Tensor, channels: Tensor) -> Work:
    store = store_channels(x, channels, "tokens")
    return _counted(layer, channels, x, dy, lambda: token_wgrad(store, dy, out_dtype=x.dtype), lambda: dy.T @ x,
                    token_wgrad_bytes(len(x), layer.out_channels, layer.drawn, x.itemsize, 0, x.itemsize))  # fmt: skip


def _product(layer: Layer, x: Tensor, dy: Tensor, channels: Tensor) -> Work:
    store = store_channels(x, channels, "pixels", (layer.stride, layer.stride))
    tokens = dy.numel() // layer.out_channels
    nbytes = token_wgrad_bytes(tokens, layer.out_channels, layer.drawn, x.itemsize, 0, x.itemsize)

    def sparse() -> Tensor:
        return token_wgrad(store, dy, 1, out_dtype=x.dtype)

    return _counted(layer, channels, x, dy, sparse, _dense_conv(layer, x, dy), nbytes)


def _conv(layer: Layer, x: Tensor, dy: Tensor, channels: Tensor) -> Work:
    kernel, stride = [layer.kernel] * 2, [layer.stride] * 2
    padding, dilation, taps = [layer.kernel // 2] * 2, [1, 1], layer.kernel**2
    if layer.groups > 1:
        store, group = store_channels(x, channels, "planes"), (1, layer.out_channels // layer.groups)
        nbytes = grouped_wgrad_bytes(store.shape, dy.shape, group[1], taps, x.itemsize, 0, x.itemsize)

        def grouped() -> Tensor:
            return grouped_wgrad(store, dy, channels, group, kernel, stride, padding, dilation, x.dtype)

        return _counted(layer, channels, x, dy, grouped, _dense_conv(layer, x, dy), nbytes)
    store = store_channels(x, channels, "planes")
    nbytes = conv_wgrad_bytes(store.shape, dy.shape, taps, x.itemsize, x.itemsize)

    def sparse() -> Tensor:
        return conv_wgrad(store, dy, kernel, stride, padding, dilation, x.dtype)

    return _counted(layer, channels, x, dy, sparse, _dense_conv(layer, x, dy), nbytes)


def _dense_conv(layer: Layer, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    shape = (layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel)
    weight = x.new_empty(1).expand(shape)

    def dense() -> Tensor:
        gradient: Tensor = torch.ops.aten.convolution_backward(
            dy, x, weight, None, [layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1], False, [0, 0], layer.groups,
            [False, True, False],
        )[1]  # fmt: skip
        return gradient

    return dense


def _counted(layer: Layer, channels: Tensor, x: Tensor, dy: Tensor, sparse: Callable[[], Tensor],
             dense: Callable[[], Tensor], sparse_bytes: int) -> Work:  # fmt: skip
    def error() -> float:
        """Relative, of the compact gradient [K, O/G, ...] against those channels of the dense one."""
        whole = dense().double()
        grouped = whole.view(layer.groups, whole.shape[0] // layer.groups, *whole.shape[1:])
        wanted = grouped.movedim(2, 1).flatten(0, 1)[channels].flatten(1)  # from [C, O/G, ...]
        return float((sparse().double().flatten(1) - wanted).norm() / wanted.norm())

    channel_weights = layer.out_channels // layer.groups * max(1, layer.kernel) ** 2
    channel_flops = 2 * channel_weights * (dy.numel() // layer.out_channels)
    weights = layer.in_channels * channel_weights
    return Work(error, sparse, dense, sparse_bytes, layer.drawn * channel_flops,
                x.itemsize * (x.numel() + dy.numel() + weights), layer.in_channels * channel_flops)  # fmt: skip
