"""Philox4x32-10 bits for stochastic rounding, the same in Triton and in torch.

One counter (c0, c1, c2, c3) gives four 32-bit words, cut into eight 16-bit values: value 2m + h is half h (0 low, 1
high) of word m.  A rounding keyed by (seed, element) is repeated exactly when checkpointing recomputes it. Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch

from trady_triton.ops.dispatch import jit, tl

VALUES_PER_COUNTER = 8
_MASK32 = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


@jit
def random16(seed, c0, c1, c2, c3):
    """16-bit values [..., 2, 2, 2] as int32 for int32 counters c0 [...]; the others broadcast to it."""
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, zero + c1, zero + c2, zero + c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.join(words & 0xFFFF, words >> 16).to(tl.int32)


def _multiply(constant: int, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    product = value * constant  # modulo 2^64: the bits of the unsigned product
    return (product >> 32) & _MASK32, product & _MASK32


def random16_ref(
    seed: torch.Tensor, c0: torch.Tensor, c1: int | torch.Tensor, c2: int | torch.Tensor, c3: int
) -> torch.Tensor:
    """16-bit values [..., 8] as int64 for int64 counters c0 [...]; c1, c2, c3 broadcast to c0."""
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    x0, x1, x2, x3 = torch.broadcast_tensors(c0, *(torch.as_tensor(c, device=c0.device) for c in (c1, c2, c3)))
    for _ in range(10):
        high_b, low_b = _multiply(_ROUND_B, x2)
        high_a, low_a = _multiply(_ROUND_A, x0)
        x0, x1, x2, x3 = high_b ^ x1 ^ key0, low_b, high_a ^ x3 ^ key1, low_a
        key0, key1 = (key0 + _KEY_A) & _MASK32, (key1 + _KEY_B) & _MASK32
    words = torch.stack((x0, x1, x2, x3), dim=-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-2)
