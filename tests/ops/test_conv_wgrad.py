"""The compact gradient of a convolution is the float64 gradient's slice for the selected channels."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.conv_cases import CONVS, Conv
from tests.ops.numerics import GuardedArena, assert_finite, assert_no_worse_than, relative_error
from trady_triton.ops import select_config
from trady_triton.ops.conv_wgrad import conv_wgrad, conv_wgrad_bytes, conv_wgrad_ref
from trady_triton.ops.store import padded

FP32_SUM = 2e-6  # inputs are exact in their dtype and products are added in fp32
CHANNELS = [0, 2, 3, 7, 9]


def pixel_major(x, channels):
    """The store [N, H, W, Kp] of x [N, C, H, W], by hand."""
    store = x.new_zeros(x.shape[0], *x.shape[2:], padded(len(channels)))
    for j, c in enumerate(channels):
        store[..., j] = x[:, c]
    return store


def selected(conv, x, dy, channels):
    return conv.dense_wgrad64(x, dy)[:, channels].transpose(0, 1)


def force_config(monkeypatch, **fields):
    meta = {"BM": 32, "BN": 16, "BK": fields.pop("BK", 32)}
    config = select_config.Config(meta, num_warps=4, num_stages=2, **fields)
    monkeypatch.setitem(select_config.RULES, "conv_wgrad", lambda *_: config)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=lambda conv: conv.name)
def test_kernel_equals_float64_between_poisoned_margins(conv, dtype, channels_last, generator):
    x, dy = conv.draw(2, 10, 9, generator, dtype, channels_last=channels_last)
    with GuardedArena() as arena:
        out = conv_wgrad(arena.place(pixel_major(x, CHANNELS)), arena.place(dy), 5, *conv.geometry)
    assert_finite(out)
    assert relative_error(out, selected(conv, x, dy, CHANNELS)) <= FP32_SUM


@pytest.mark.parametrize("conv", CONVS, ids=lambda conv: conv.name)
def test_twin_equals_float64(conv, generator, monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "torch")
    x, dy = conv.draw(2, 10, 9, generator, torch.float64)
    out = conv_wgrad(pixel_major(x, CHANNELS), dy, 5, *conv.geometry, torch.float64)
    torch.testing.assert_close(out, selected(conv, x, dy, CHANNELS), rtol=1e-12, atol=1e-12)


@st.composite
def convolutions(draw):
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    kernel_size, dilation, padding, more = pair(1, 4), pair(1, 2), pair(0, 3), pair(1, 6)
    reach = [d * (r - 1) + 1 for r, d in zip(kernel_size, dilation, strict=True)]
    size = tuple(max(1, need - 2 * p) + m for need, p, m in zip(reach, padding, more, strict=True))
    return Conv("drawn", size, kernel_size, pair(1, 4), padding, dilation, pair(0, 1))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(convolutions(), st.integers(1, 9), st.integers(1, 20), st.integers(1, 3), st.booleans())
def test_any_geometry_equals_float64(conv, K, O, N, channels_last):
    x, dy = conv.draw(N, K, O, torch.Generator().manual_seed(0), channels_last=channels_last)
    out = conv_wgrad(pixel_major(x, range(K)), dy, K, *conv.geometry)
    assert relative_error(out, selected(conv, x, dy, list(range(K)))) <= FP32_SUM


@pytest.mark.parametrize(("split", "BK"), [(1, 16), (2, 32), (3, 16), (7, 32)])
def test_splits_and_block_size_do_not_change_the_result(split, BK, generator, monkeypatch):
    conv = CONVS[0]
    x, dy = conv.draw(1, 10, 9, generator)
    force_config(monkeypatch, split=split, BK=BK)
    with GuardedArena() as arena:
        out = conv_wgrad(arena.place(pixel_major(x, CHANNELS)), arena.place(dy), 5, *conv.geometry)
    assert relative_error(out, selected(conv, x, dy, CHANNELS)) <= FP32_SUM


def test_gradient_is_linear_in_dy(generator):
    conv = CONVS[1]
    x, dy = conv.draw(2, 10, 9, generator)
    store = pixel_major(x, CHANNELS)
    one, two = (conv_wgrad(store, d, 5, *conv.geometry) for d in (dy, dy.flip(1)))
    both = conv_wgrad(store, dy + 2 * dy.flip(1), 5, *conv.geometry)
    assert relative_error(both, (one + 2 * two).double()) <= FP32_SUM


def test_reordered_channels_reorder_the_rows(generator):
    conv = CONVS[1]
    x, dy = conv.draw(2, 10, 9, generator)
    out = conv_wgrad(pixel_major(x, CHANNELS), dy, 5, *conv.geometry)
    flipped = conv_wgrad(pixel_major(x, CHANNELS[::-1]), dy, 5, *conv.geometry)
    assert relative_error(flipped, out.flip(0).double()) <= FP32_SUM  # BLAS, below the interpreter, sums rows by place


@pytest.mark.parametrize("K", [0, 1, 8, 12])
def test_any_number_of_channels(K, generator):
    conv = CONVS[1]
    x, dy = conv.draw(2, 12, 17, generator)
    out = conv_wgrad(pixel_major(x, range(K)), dy, K, *conv.geometry)
    want = selected(conv, x, dy, list(range(K)))
    assert out.shape == want.shape
    assert K == 0 or relative_error(out, want) <= FP32_SUM


def test_padding_channels_of_the_store_do_not_matter(generator):
    conv = CONVS[1]
    x, dy = conv.draw(2, 10, 9, generator)
    store = pixel_major(x, CHANNELS)
    out = conv_wgrad(store, dy, 5, *conv.geometry)
    store[..., 5:] = 1e3
    assert torch.equal(conv_wgrad(store, dy, 5, *conv.geometry), out)


@pytest.mark.parametrize("kind", ["expanded", "slice"])
def test_strided_dy_gives_the_same(kind, generator):
    conv = CONVS[1]
    x, dy = conv.draw(2, 10, 9, generator)
    strided = dy[:, :, :1, :1].expand_as(dy) if kind == "expanded" else torch.cat([dy, dy], 3)[..., : dy.shape[3]]
    out = conv_wgrad(pixel_major(x, CHANNELS), strided, 5, *conv.geometry)
    assert torch.equal(out, conv_wgrad(pixel_major(x, CHANNELS), strided.contiguous(), 5, *conv.geometry))


def test_no_image_gives_zeros():
    out = conv_wgrad(torch.empty(0, 4, 4, 8), torch.empty(0, 6, 4, 4), 3, *CONVS[0].geometry)
    assert torch.equal(out, torch.zeros(3, 6, 3, 3))


def test_rounded_result_is_as_good_as_torch(generator):
    conv = CONVS[0]
    x, dy = conv.draw(2, 10, 9, generator, torch.float16)
    args = (pixel_major(x, CHANNELS), dy, 5, *conv.geometry)
    want = selected(conv, x, dy, CHANNELS)
    assert_no_worse_than(conv_wgrad(*args, torch.float16), conv_wgrad_ref(*args, torch.float16), want)


def test_opcheck(generator, monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "torch")
    conv = CONVS[1]
    x, dy = conv.draw(2, 10, 9, generator)
    args = (pixel_major(x, CHANNELS), dy, 5, *(list(pair) for pair in conv.geometry), torch.float32)
    opcheck(torch.ops.trady.conv_wgrad.default, args)


def test_flop_counter_and_bytes(generator):
    conv = CONVS[0]
    x, dy = conv.draw(2, 10, 9, generator)
    with FlopCounterMode(display=False) as counter:
        conv_wgrad(pixel_major(x, CHANNELS), dy, 5, *conv.geometry)
    assert counter.get_total_flops() == 2 * (2 * 90) * 9 * 5 * 9
    assert conv_wgrad_bytes((2, 9, 10, 8), (2, 9, 9, 10), 5, 9, itemsize=2) == 2 * 180 * (8 + 9) + 4 * 5 * 9 * 9


def test_rule_stays_within_the_limits():
    rng = random.Random(0)
    for _ in range(10_000):
        most = {"T": 10**6, "O": 4096, "K": 512, "TAPS": 121, "PQ": 12544}
        shape = {name: rng.randint(1, size) for name, size in most.items()}
        dtype = rng.choice([torch.float32, torch.bfloat16])
        config = select_config.select_config("conv_wgrad", shape, dtype, select_config.Arch("sm_90"))
        BM, BN = config.meta["BM"], config.meta["BN"]
        programs = -(-shape["TAPS"] * padded(shape["K"]) // BM) * -(-shape["O"] // BN) * config.split
        partial_bytes = 4 * config.split * shape["TAPS"] * shape["K"] * shape["O"]
        assert BM * BN / (32 * config.num_warps) <= select_config.MAX_ACCUMULATORS_PER_THREAD
        assert config.split == 1 or partial_bytes <= select_config.MAX_WORKSPACE_BYTES
        assert programs <= select_config.MAX_PROGRAMS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 9, 10, 8)}, "images of dy"),
        ({"x": torch.zeros(2, 9, 10, 8, dtype=torch.float16)}, "wanted contiguous"),
        ({"x": torch.zeros(2, 8, 9, 10).permute(0, 2, 3, 1)}, "strides"),
        ({"k": 9}, "k: got 9"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    args = {"x": torch.zeros(2, 9, 10, 8), "dy": torch.zeros(2, 9, 9, 10), "k": 5} | change
    with pytest.raises(ValueError, match=message):
        conv_wgrad(*args.values(), *CONVS[0].geometry)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [56, 14, 7])
def test_device_equals_float64_and_repeats(size, channels_last, generator):
    conv = Conv("3x3", (size, size), (3, 3), padding=(1, 1))
    x, dy = (t.cuda() for t in conv.draw(8, 24, 72, generator, torch.bfloat16, channels_last=channels_last))
    store = pixel_major(x, range(24))
    out = conv_wgrad(store, dy, 24, *conv.geometry)
    assert relative_error(out, selected(conv, x, dy, list(range(24)))) <= 1e-5
    for _ in range(100):
        assert torch.equal(conv_wgrad(store, dy, 24, *conv.geometry), out)
