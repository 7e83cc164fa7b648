"""The compact gradient of a dense convolution from its planes is the one that the kernel computes from taps."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.conv_cases import CONVS
from tests.ops.numerics import GuardedArena, assert_finite, relative_error
from trady_triton.ops import planes_wgrad, store_channels
from trady_triton.ops.planes_wgrad import planes_wgrad_bytes

CHANNELS = torch.tensor([0, 2, 3, 7, 9])


def selected(conv, x, dy):
    return conv.dense_wgrad64(x, dy)[:, CHANNELS].transpose(0, 1)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("conv", CONVS, ids=lambda conv: conv.name)
def test_kernel_and_twin_equal_float64(conv, channels_last, backend, generator, monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", backend)
    x, dy = conv.draw(2, 10, 9, generator, channels_last=channels_last)
    with GuardedArena() as arena:
        out = planes_wgrad(store_channels(arena.place(x), CHANNELS, "planes"), arena.place(dy), *conv.geometry)
    assert_finite(out)
    assert out.shape == (5, 9, *conv.kernel_size)
    assert relative_error(out, selected(conv, x, dy)) <= 2e-6


@pytest.mark.parametrize("K", [0, 1, 10])
def test_any_number_of_channels(K, generator):
    x, dy = CONVS[1].draw(2, 10, 9, generator)
    out = planes_wgrad(store_channels(x, torch.arange(K), "planes"), dy, *CONVS[1].geometry)
    want = CONVS[1].dense_wgrad64(x, dy)[:, :K].transpose(0, 1)
    assert out.shape == want.shape
    assert K == 0 or relative_error(out, want) <= 2e-6


def test_opcheck(generator, monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "torch")
    x, dy = CONVS[1].draw(2, 10, 9, generator)
    args = (store_channels(x, CHANNELS, "planes"), dy, *(list(pair) for pair in CONVS[1].geometry), torch.float32)
    opcheck(torch.ops.trady.planes_wgrad.default, args)


def test_flop_counter_and_bytes(generator):
    x, dy = CONVS[0].draw(2, 10, 9, generator)
    with FlopCounterMode(display=False) as counter:
        planes_wgrad(store_channels(x, CHANNELS, "planes"), dy, *CONVS[0].geometry)
    assert counter.get_total_flops() == 2 * (2 * 90) * 9 * 5 * 9
    assert planes_wgrad_bytes((5, 2, 9, 10), (2, 9, 9, 10), 9, itemsize=2) == 2 * 180 * (5 + 9) + 4 * 5 * 9 * 9


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="images of dy"):
        planes_wgrad(torch.zeros(5, 3, 9, 10), torch.zeros(2, 9, 9, 10), *CONVS[0].geometry)
