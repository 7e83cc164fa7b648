"""Convolutions that the tests of the weight gradients share, and their independent float64 reference."""

from dataclasses import dataclass

import torch
from torch.nn.functional import conv2d, pad


@dataclass(frozen=True)
class Conv:
    """A convolution: `padding` is top and left, `far` is what bottom and right are padded more than that."""

    name: str
    size: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    far: tuple[int, int] = (0, 0)

    @property
    def geometry(self):
        return self.kernel_size, self.stride, self.padding, self.dilation

    def forward(self, x, weight, groups=1):
        """The convolution of x with zeros written out around it."""
        (top, left), (more_h, more_w) = self.padding, self.far
        padded = pad(x, (left, left + more_w, top, top + more_h))
        return conv2d(padded, weight, None, self.stride, 0, self.dilation, groups)

    def draw(self, N, C, O, generator, dtype=torch.float32, groups=1, channels_last=False):
        """x [N, C, H, W] and dy [N, O, P, Q] of normal numbers that are exact in `dtype`."""
        x = torch.randn(N, C, *self.size, generator=generator).to(dtype)
        weight = torch.empty(O, C // groups, *self.kernel_size, device="meta")
        shape = self.forward(x.to("meta").float(), weight, groups).shape
        dy = torch.randn(shape, generator=generator).to(dtype)
        return x, dy.contiguous(memory_format=torch.channels_last) if channels_last else dy

    def dense_wgrad64(self, x, dy, groups=1):
        """The full weight gradient [O, C / G, R, S] by autograd in float64."""
        weight = x.new_zeros(dy.shape[1], x.shape[1] // groups, *self.kernel_size, dtype=torch.float64)
        weight.requires_grad_()
        (grad,) = torch.autograd.grad(self.forward(x.double(), weight, groups), weight, dy.double())
        return grad


CONVS = [
    Conv("3x3", (9, 10), (3, 3), padding=(1, 1)),
    Conv("3x3 stride 2", (9, 12), (3, 3), stride=(2, 2), padding=(1, 1)),
    Conv("same padding, more at the bottom and right", (8, 10), (3, 3), stride=(2, 2), far=(1, 1)),
    Conv("same padding 5x5", (9, 8), (5, 5), stride=(2, 2), padding=(2, 1), far=(0, 1)),
    Conv("stride beyond the kernel", (11, 10), (2, 2), stride=(3, 4)),
    Conv("dilation", (12, 11), (3, 2), padding=(2, 1), dilation=(2, 3)),
    Conv("padding beyond the kernel", (5, 6), (3, 3), padding=(4, 3)),
    Conv("one pixel", (1, 1), (3, 3), padding=(1, 1)),
    Conv("a row", (1, 40), (1, 7), padding=(0, 3)),
    Conv("a 7x7 patch", (14, 7), (7, 7), stride=(7, 7)),
]
