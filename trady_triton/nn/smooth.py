"""SiLU, GELU and Hardswish that keep their derivative in 8 or 2 bits an element where the policy allows it.

An exact policy keeps the input, as torch does: nothing smaller is exact.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from trady_triton.nn.graph import builds_graph
from trady_triton.nn.packed_activation import packed_activation
from trady_triton.policy import Policy


def lean_activation(
    x: Tensor, run: Callable[[Tensor], Tensor], kind: str, policy: Policy, inplace: bool = False
) -> Tensor:
    """run(x), the activation `kind` (a key of `ops.activation.SMOOTH`), keeping what the policy allows.

    `inplace` tells whether run changes x.
    """
    bits = policy.derivative_bits
    if bits is None or not builds_graph(x):
        return run(x)
    return packed_activation(x, kind, bits, inplace=inplace)


class LeanSiLU(nn.SiLU):
    """nn.SiLU whose derivative may be packed."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return lean_activation(input, super().forward, "silu", self.policy, self.inplace)


class LeanHardswish(nn.Hardswish):
    """nn.Hardswish whose derivative may be packed."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return lean_activation(input, super().forward, "hardswish", self.policy, self.inplace)


class LeanGELU(nn.GELU):
    """nn.GELU whose derivative may be packed."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        kind = "gelu" if self.approximate == "none" else "gelu_tanh"
        return lean_activation(input, super().forward, kind, self.policy)
