"""How op tests compare: the error-ratio rule, and an arena that surrounds every tensor with poison.

from tests.ops.numerics import GuardedArena, assert_finite, assert_no_worse_than

with GuardedArena() as arena:           # torch.empty inside ops returns NaN-filled memory between NaN margins
    x, dy = arena.place(x), arena.place(dy)      # copies with the same strides between margins
    out = op(x, dy)
# leaving the block asserts that every margin is intact
assert_finite(out)
assert_no_worse_than(out, low=twin(x, dy), ref64=twin(x.double(), dy.double()))
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MARGIN = 4096
POISON_BYTE = 0x71
DISPATCH_KEY = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}


def assert_no_worse_than(out, low, ref64, factor=2.0, tiny=1e-6):
    """`out` may err `factor` times as much as torch does in the same precision, plus `tiny` of the largest value."""
    assert out.shape == ref64.shape
    if out.numel() == 0:
        return
    error = (out.double() - ref64).abs().max()
    limit = factor * (low.double() - ref64).abs().max() + tiny * ref64.abs().max()
    assert error <= limit, f"max error {error:.3g}, torch in the same precision allows {limit:.3g}"


def assert_finite(tensor):
    """No element was left unwritten or touched poison."""
    assert tensor.isfinite().all(), f"{(~tensor.isfinite()).sum()} of {tensor.numel()} elements are not finite"


def relative_error(out, ref64):
    """Largest error over largest value: the 2e-6 (fp32) and 6e-3 (bf16 intermediate) bars are meant for it."""
    return ((out.double() - ref64).abs().max() / ref64.abs().max().clamp_min(1e-30)).item()


class GuardedArena(TorchDispatchMode):
    """Puts tensors, and what ops allocate with torch.empty or new_empty, between poisoned margins."""

    EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default)
    NEW_EMPTY = (torch.ops.aten.new_empty.default, torch.ops.aten.new_empty_strided.default)

    def __init__(self):
        super().__init__()
        self.margins = []

    def place(self, tensor):
        """A copy with the same strides between margins."""
        copy = self._guard(torch.empty_like(tensor))
        return copy.copy_(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "trady":
            with self:  # the kernel of the op itself, so that what it allocates is seen here
                return func._op_dk(DISPATCH_KEY[args[0].device.type], *args, **kwargs)
        out = func(*args, **kwargs)
        return self._guard(out) if func in self.EMPTY + self.NEW_EMPTY else out

    def __exit__(self, *exc):
        super().__exit__(*exc)
        if exc[0] is None:
            self.check()

    def check(self):
        """Raises AssertionError when something was written outside its tensor."""
        for margin, clean in self.margins:
            assert torch.equal(margin.view(torch.uint8), clean.view(torch.uint8)), "a kernel wrote outside its tensor"

    def _guard(self, tensor):
        if tensor.numel() == 0 or tensor.device.type not in ("cpu", "cuda"):
            return tensor
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        buffer = self._poisoned(span + 2 * MARGIN, tensor.dtype, tensor.device)
        for part in (buffer[:MARGIN], buffer[MARGIN + span :]):
            self.margins.append((part, part.clone()))
        return buffer.as_strided(tensor.shape, tensor.stride(), MARGIN)

    @staticmethod
    def _poisoned(numel, dtype, device):
        if dtype.is_floating_point:
            return torch.full((numel,), float("nan"), dtype=dtype, device=device)
        raw = torch.full((numel * dtype.itemsize,), POISON_BYTE, dtype=torch.uint8, device=device)
        return raw.view(dtype)
