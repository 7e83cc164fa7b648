"""On a device: lean convolutions and pools give torch's dX in the layout of dY, without copies of the size of x."""

import pytest
import torch
from torch import nn
from torch.backends import cudnn

from trady_triton.functional import ConvGeometry, lean_conv2d
from trady_triton.nn.pool import LeanAvgPool2d, LeanMaxPool2d

pytestmark = pytest.mark.gpu


def gradient(run, x, dy):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(run(x), x, dy)[0]


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 64), (2, 4)])
def test_dx_of_a_channels_last_convolution(stride, groups):
    torch.manual_seed(0)
    weight = torch.randn(64, 64 // groups, 3, 3, device="cuda").contiguous(memory_format=torch.channels_last)
    x = torch.randn(8, 64, 28, 28, device="cuda").contiguous(memory_format=torch.channels_last)
    geometry = ConvGeometry((stride, stride), (1, 1), (1, 1), groups)
    dy = torch.randn_like(nn.functional.conv2d(x, weight, None, stride, 1, 1, groups))
    with cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        dx = gradient(lambda x: lean_conv2d(x, weight, None, None, geometry), x, dy)
        expected = gradient(lambda x: nn.functional.conv2d(x, weight, None, stride, 1, 1, groups), x, dy)
    torch.testing.assert_close(dx, expected)
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("lean", "plain"), [(LeanMaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)), (LeanAvgPool2d(2), nn.AvgPool2d(2))]
)
def test_dx_of_a_pool(lean, plain, memory_format):
    x = torch.randn(8, 64, 56, 56, device="cuda").contiguous(memory_format=memory_format)
    dy = torch.randn_like(plain(x))
    dx = gradient(lean, x, dy)
    torch.testing.assert_close(dx, gradient(plain, x, dy))
    assert dx.stride() == x.stride()


def test_the_backward_of_an_average_pool_holds_no_second_input():
    x = torch.randn(8, 64, 56, 56, device="cuda", requires_grad=True)
    y = LeanAvgPool2d(2)(x)
    dy = torch.randn_like(y)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dx = torch.autograd.grad(y, x, dy)[0]
    assert torch.cuda.max_memory_allocated() - before < 1.5 * dx.nbytes
