"""What one input channel of a layer costs: elements, bytes and FLOPs. The one accountant of plans, benches and tests.

Shapes: C input channels, O output channels, G groups, `kernel_size` () for Linear. Positions are the spatial sizes
multiplied (H*W of a convolution, tokens of a Linear), summed over the calls of the layer in one forward of ONE sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor, nn

from trady_triton.ops.quantize import quantized_bytes

DEPTHWISE_CHARGES = ("exact", "paper")
STORE_BITS = {"same": 0, "int8": 8, "int4": 4}
OPTIMIZER_STATES = {"sgd": 0, "momentum": 1, "adamw": 2}


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one Conv2d or Linear, all for one sample.

    `in_positions` counts the whole input, `stored_positions` what the compact store keeps of a channel: less where a
    strided 1x1 convolution skips pixels. `parts` is in how many pieces it comes, which are quantised apart: the calls
    of a layer, and of a convolution that is not a matrix product the images of every call. `calls` holds the stored
    positions and the parts of each call, where there is more than one: they may differ.
    """

    in_channels: int
    out_channels: int
    in_positions: int
    out_positions: int
    stored_positions: int
    groups: int = 1
    kernel_size: tuple[int, ...] = ()
    parts: int = 1
    calls: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LayerShape:
        """Rebuild from `dataclasses.asdict`, whose tuples JSON has turned into lists."""
        calls = tuple((positions, parts) for positions, parts in content.get("calls", ()))
        return cls(**{**content, "kernel_size": tuple(content["kernel_size"]), "calls": calls})

    def joined(self, other: LayerShape) -> LayerShape:
        """The shape of a weight that is used twice in a forward: positions add up."""
        return replace(
            self,
            in_positions=self.in_positions + other.in_positions,
            out_positions=self.out_positions + other.out_positions,
            stored_positions=self.stored_positions + other.stored_positions,
            parts=self.parts + other.parts,
            calls=self.each_call + other.each_call,
        )

    @property
    def each_call(self) -> tuple[tuple[int, int], ...]:
        """Stored positions and parts of every call."""
        return self.calls or ((self.stored_positions, self.parts),)

    @property
    def is_product(self) -> bool:
        """Whether the layer is a matrix product over tokens or kept pixels."""
        return prod(self.kernel_size) == self.groups == 1 and self.stored_positions == self.out_positions

    @property
    def is_depthwise(self) -> bool:
        """Whether every input channel has its own filters and nothing else."""
        return self.groups == self.in_channels > 1

    @property
    def channel_weights(self) -> int:
        """Weight elements that one input channel reaches: O/G * prod(kernel_size) (eq. 3, first term)."""
        return self.out_channels // self.groups * prod(self.kernel_size)

    @property
    def weights(self) -> int:
        """Weight elements of the layer, bias excluded."""
        return self.in_channels * self.channel_weights

    @property
    def inputs(self) -> int:
        """Input elements of the layer for one sample."""
        return self.in_channels * self.in_positions

    @property
    def channel_wgrad_flops(self) -> int:
        """FLOPs (2 a multiply-add) of dW[:, c] for one sample: twice eq. 4."""
        return 2 * self.channel_weights * self.out_positions

    @property
    def dense_flops(self) -> int:
        """FLOPs of the layer's forward for one sample; dX and the dense dW cost the same."""
        return self.in_channels * self.channel_wgrad_flops


def measure_call(module: nn.Conv2d | nn.Linear, x: Tensor, y: Tensor, batch_size: int) -> LayerShape:
    """Sizes of one call y = module(x), divided by the batch.

    x is [N, C, H, W] for a convolution and [..., C] for a Linear; windows or heads folded into the leading
    dimensions count as positions.
    """
    if isinstance(module, nn.Linear):
        positions = x.numel() // (module.in_features * batch_size)
        return LayerShape(module.in_features, module.out_features, positions, positions, positions)
    samples = max(1, x.shape[0] // batch_size)
    inputs, outputs = samples * prod(x.shape[2:]), samples * prod(y.shape[2:])
    shape = LayerShape(
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        in_positions=inputs,
        out_positions=outputs,
        stored_positions=outputs if keeps_strided_pixels(module.kernel_size, module.padding) else inputs,
        groups=module.groups,
        kernel_size=tuple(module.kernel_size),
    )
    return shape if shape.is_product else replace(shape, parts=samples)


def keeps_strided_pixels(kernel_size: tuple[int, ...], padding: str | tuple[int, ...]) -> bool:
    """Whether a convolution reads only the pixels that its stride keeps: a 1x1 kernel without padding."""
    return prod(kernel_size) == 1 and not (isinstance(padding, tuple) and any(padding))


@dataclass(frozen=True)
class CostModel:
    """How a channel is charged against the budget.

    The default counts elements for one sample, the paper's unit. With item sizes in bytes and the batch size of the
    training it counts the bytes of a channel's compact gradient and compact store. `states` is how many tensors of the
    gradient's shape the optimizer keeps: 0 for SGD, 1 with momentum, 2 for AdamW.
    `depthwise="paper"` charges a depthwise channel 1 weight instead of its D*D, as the paper's own numbers do.
    """

    batch_size: int = 1
    gradient_itemsize: int = 1
    activation_itemsize: int = 1
    unit: str = "elements"
    depthwise: str = "exact"
    states: int = 0
    state_itemsize: int = 1
    store: str = "same"

    def __post_init__(self) -> None:
        if self.depthwise not in DEPTHWISE_CHARGES:
            raise ValueError(f"cost_model {self.depthwise!r}: wanted one of {', '.join(DEPTHWISE_CHARGES)}")
        if self.unit not in ("elements", "bytes"):
            raise ValueError(f"unit {self.unit!r}: wanted elements or bytes")
        if self.store not in STORE_BITS:
            raise ValueError(f"store {self.store!r}: wanted one of {', '.join(STORE_BITS)}")
        if self.store != "same" and self.unit != "bytes":
            raise ValueError(f"store {self.store!r}: saves bytes, so the budget must count them, such as '256KiB'")
        for name in ("batch_size", "gradient_itemsize", "activation_itemsize", "states", "state_itemsize"):
            value, least = getattr(self, name), 0 if name == "states" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} {value!r}: wanted an integer of at least {least}")

    def gradient_cost(self, shape: LayerShape) -> int:
        """Charge of one channel's compact gradient dW[:, c]."""
        return self._weights(shape) * self.gradient_itemsize

    def state_cost(self, shape: LayerShape) -> int:
        """Charge of what the optimizer keeps of one channel."""
        return self._weights(shape) * self.states * self.state_itemsize

    def activation_cost(self, shape: LayerShape) -> int:
        """Charge of one channel's compact store A[:, c], all samples of the batch: codes and scales if quantised."""
        if self.store == "same":
            return shape.stored_positions * self.batch_size * self.activation_itemsize
        return sum(self._quantized_call(shape.is_product, *call) for call in shape.each_call)

    def channel_cost(self, shape: LayerShape) -> int:
        """Charge of training one input channel (eq. 3, and the optimizer's state)."""
        return self.gradient_cost(shape) + self.activation_cost(shape) + self.state_cost(shape)

    def _quantized_call(self, is_product: bool, positions: int, parts: int) -> int:
        bits = STORE_BITS[self.store]
        if is_product:
            return quantized_bytes("tokens", (1, positions * self.batch_size), bits)
        return quantized_bytes("planes", (1, self.batch_size * parts, 1, positions // parts), bits)

    def _weights(self, shape: LayerShape) -> int:
        return 1 if self.depthwise == "paper" and shape.is_depthwise else shape.channel_weights
