"""The paper's three networks as data: MobileNetV2-w0.35, MCUNet-in1 and ProxylessNAS-w0.3.

Each is a 3x3 convolution of stride 2 (the stem), a chain of inverted residual blocks (1x1 expansion `pw1`, depthwise
`dw`, 1x1 projection `pw2`) and, in two of them, a last 1x1 convolution (`feature_mix`).
"""

from typing import NamedTuple


class Stage(NamedTuple):
    """`repeats` blocks of one shape; only the first has the stride and the change of channels."""

    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    channels: int


class Arch(NamedTuple):
    """The stages after the stem, and the channels of the last 1x1 convolution (0 for none)."""

    stages: tuple[Stage, ...]
    mix_channels: int

    def blocks(self) -> list[Stage]:
        """One row a block, the repeats written out."""
        return [s._replace(repeats=1, stride=1 if r else s.stride) for s in self.stages for r in range(s.repeats)]


STEM_CHANNELS = 16

# fmt: off
_MOBILENETV2_W035 = (
    (1, 3, 1, 1, 8), (2, 3, 2, 6, 8), (3, 3, 2, 6, 16), (4, 3, 2, 6, 24), (3, 3, 1, 6, 32), (3, 3, 2, 6, 56),
    (1, 3, 1, 6, 112),
)
_MCUNET_IN1 = (
    (1, 3, 1, 1, 8), (1, 3, 2, 4, 16), (1, 3, 1, 3, 16), (1, 7, 2, 3, 24), (1, 3, 1, 5, 24), (1, 3, 2, 5, 40),
    (1, 7, 1, 4, 40), (1, 5, 1, 4, 48), (1, 3, 1, 3, 48), (1, 3, 1, 4, 48), (1, 7, 2, 5, 96), (2, 5, 1, 4, 96),
    (1, 3, 1, 6, 160),
)
_PROXYLESSNAS_W03 = (
    (1, 3, 1, 1, 8), (1, 5, 2, 3, 16), (1, 3, 1, 3, 16), (1, 7, 2, 3, 16), (1, 3, 1, 3, 16), (2, 5, 1, 3, 16),
    (1, 7, 2, 6, 24), (3, 5, 1, 3, 24), (1, 5, 1, 6, 32), (3, 5, 1, 3, 32), (1, 7, 2, 6, 64), (1, 7, 1, 6, 64),
    (2, 7, 1, 3, 64), (1, 7, 1, 6, 96),
)
# fmt: on

ARCHS = {
    "mobilenetv2_w035": Arch(tuple(Stage(*row) for row in _MOBILENETV2_W035), 448),
    "mcunet_in1": Arch(tuple(Stage(*row) for row in _MCUNET_IN1), 0),
    "proxylessnas_w03": Arch(tuple(Stage(*row) for row in _PROXYLESSNAS_W03), 384),
}


def conv_names(name: str) -> list[str]:
    """Module names of a net's convolutions in its paper form, in order of call: entry i is layer i of the paper."""
    names = ["stem"]
    for i, block in enumerate(ARCHS[name].blocks()):
        convs = ("dw", "pw2") if block.expansion == 1 else ("pw1", "dw", "pw2")
        names += [f"blocks.{i}.{conv}" for conv in convs]
    return names + ["feature_mix"] * (ARCHS[name].mix_channels > 0)
