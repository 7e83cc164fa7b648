"""Lean form of timm's gated MLP."""

from __future__ import annotations

from timm.layers import GluMlp
from torch import Tensor

from trady_triton.nn.packed_input import packed_call
from trady_triton.policy import Policy
from trady_triton.registry import plain_forward


class LeanGluMlp(GluMlp):
    """timm's gated MLP, as SwiGLU, which may keep what its two halves are made of in one byte an element."""

    policy: Policy = Policy()

    def forward(self, x: Tensor) -> Tensor:
        """Input [..., C], or [N, C, H, W] for one of convolutions -> the same shape with the layer's outputs."""
        if self.policy.is_exact:
            return super().forward(x)
        x = packed_call(self._product, self.fc1(x), (self.chunk_dim,), self.policy)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))

    def _product(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=self.chunk_dim)
        if self.gate_last:
            return left * plain_forward(self.act, right)
        return plain_forward(self.act, left) * right
