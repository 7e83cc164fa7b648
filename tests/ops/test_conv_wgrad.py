"""The compact gradient of a convolution is the float64 gradient's slice for the selected channels."""

import importlib
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.conv_cases import CONVS, Conv
from tests.ops.numerics import GuardedArena, assert_finite, assert_no_worse_than, relative_error
from trady_triton.ops import conv_geometry, select_config
from trady_triton.ops.conv_geometry import Geometry, fits_kernel
from trady_triton.ops.conv_wgrad import conv_wgrad, conv_wgrad_bytes, conv_wgrad_ref
from trady_triton.ops.store import padded

module = importlib.import_module("trady_triton.ops.conv_wgrad")  # the package has a function of that name

FP32_SUM = 2e-6  # inputs are exact in their dtype and products are added in fp32
CHANNELS = [0, 2, 3, 7, 9]


def planes(x, channels):
    """The store [K, N, H, W] of x [N, C, H, W], by hand."""
    return x[:, channels].transpose(0, 1).contiguous()


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


LAYOUTS = pytest.mark.parametrize(("lay_out", "k"), [(planes, None), (pixel_major, 5)], ids=["planes", "taps"])


@LAYOUTS
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=lambda conv: conv.name)
def test_kernel_equals_float64_between_poisoned_margins(conv, dtype, channels_last, lay_out, k, generator):
    x, dy = conv.draw(2, 10, 9, generator, dtype, channels_last=channels_last)
    with GuardedArena() as arena:
        out = conv_wgrad(arena.place(lay_out(x, CHANNELS)), arena.place(dy), *conv.geometry, k=k)
    assert_finite(out)
    assert relative_error(out, selected(conv, x, dy, CHANNELS)) <= FP32_SUM


@LAYOUTS
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("conv", CONVS, ids=lambda conv: conv.name)
def test_twin_equals_float64(conv, channels_last, lay_out, k, generator, monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "torch")
    x, dy = conv.draw(2, 10, 9, generator, torch.float64, channels_last=channels_last)
    out = conv_wgrad(lay_out(x, CHANNELS), dy, *conv.geometry, torch.float64, k=k)
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
    out = conv_wgrad(pixel_major(x, range(K)), dy, *conv.geometry, k=K)
    assert relative_error(out, selected(conv, x, dy, list(range(K)))) <= FP32_SUM


@pytest.mark.parametrize(("split", "BK"), [(1, 16), (2, 32), (3, 16), (7, 32)])
def test_splits_and_block_size_do_not_change_the_result(split, BK, generator, monkeypatch):
    conv = CONVS[0]
    x, dy = conv.draw(1, 10, 9, generator)
    force_config(monkeypatch, split=split, BK=BK)
    with GuardedArena() as arena:
        out = conv_wgrad(arena.place(pixel_major(x, CHANNELS)), arena.place(dy), *conv.geometry, k=5)
    assert relative_error(out, selected(conv, x, dy, CHANNELS)) <= FP32_SUM


def test_gradient_is_linear_in_dy(generator):
    conv = CONVS[1]
    x, dy = conv.draw(2, 10, 9, generator)
    store = pixel_major(x, CHANNELS)
    one, two = (conv_wgrad(store, d, *conv.geometry, k=5) for d in (dy, dy.flip(1)))
    both = conv_wgrad(store, dy + 2 * dy.flip(1), *conv.geometry, k=5)
    assert relative_error(both, (one + 2 * two).double()) <= FP32_SUM


def test_reordered_channels_reorder_the_rows(generator):
    conv = CONVS[1]
    x, dy = conv.draw(2, 10, 9, generator)
    out = conv_wgrad(pixel_major(x, CHANNELS), dy, *conv.geometry, k=5)
    flipped = conv_wgrad(pixel_major(x, CHANNELS[::-1]), dy, *conv.geometry, k=5)
    assert relative_error(flipped, out.flip(0).double()) <= FP32_SUM  # BLAS, below the interpreter, sums rows by place


@pytest.mark.parametrize("lay_out", [planes, pixel_major])
@pytest.mark.parametrize("K", [0, 1, 8, 12])
def test_any_number_of_channels(K, lay_out, generator):
    conv = CONVS[1]
    x, dy = conv.draw(2, 12, 17, generator)
    out = conv_wgrad(lay_out(x, range(K)), dy, *conv.geometry, k=None if lay_out is planes else K)
    want = selected(conv, x, dy, list(range(K)))
    assert out.shape == want.shape
    assert K == 0 or relative_error(out, want) <= FP32_SUM


def test_padding_channels_of_the_store_do_not_matter(generator):
    conv = CONVS[1]
    x, dy = conv.draw(2, 10, 9, generator)
    store = pixel_major(x, CHANNELS)
    out = conv_wgrad(store, dy, *conv.geometry, k=5)
    store[..., 5:] = 1e3
    assert torch.equal(conv_wgrad(store, dy, *conv.geometry, k=5), out)


@pytest.mark.parametrize("kind", ["expanded", "slice"])
def test_strided_dy_gives_the_same(kind, generator):
    conv = CONVS[1]
    x, dy = conv.draw(2, 10, 9, generator)
    strided = dy[:, :, :1, :1].expand_as(dy) if kind == "expanded" else torch.cat([dy, dy], 3)[..., : dy.shape[3]]
    out = conv_wgrad(pixel_major(x, CHANNELS), strided, *conv.geometry, k=5)
    assert torch.equal(out, conv_wgrad(pixel_major(x, CHANNELS), strided.contiguous(), *conv.geometry, k=5))


def test_no_image_gives_zeros():
    for store, k in ((torch.empty(0, 4, 4, 8), 3), (torch.empty(3, 0, 4, 4), None)):
        out = conv_wgrad(store, torch.empty(0, 6, 4, 4), *CONVS[0].geometry, k=k)
        assert torch.equal(out, torch.zeros(3, 6, 3, 3))


@pytest.mark.parametrize(
    ("store_size", "size", "fits"),
    [
        (2**31 - 2**12, (8, 8), True),
        (2**31 - 1, (8, 8), False),  # a tile counts on past the last element
        (0, (8, 8), False),
        (1, (2**15, 2**16 - 1), True),
        (1, (2**15 + 1, 2**16 - 1), False),
    ],
)
def test_offsets_have_to_fit_32_bits(store_size, size, fits):
    for dy in (torch.empty(1, 1, *size, device="meta"), torch.empty(1, 1, 1, 1, device="meta").expand(1, 1, *size)):
        assert fits_kernel(store_size, dy) == fits


def test_planes_that_fit_only_without_padding_go_to_the_twin(generator, monkeypatch):
    conv = CONVS[0]
    x, dy = conv.draw(2, 10, 5, generator)
    monkeypatch.setattr(conv_geometry, "MAX_OFFSET", 2 * 90 * 5)  # the kernel reads 8 channels
    monkeypatch.setattr(module, "store_channels", None)
    assert (
        relative_error(conv_wgrad(planes(x, CHANNELS), dy, *conv.geometry), selected(conv, x, dy, CHANNELS)) <= FP32_SUM
    )


def test_rounded_result_is_as_good_as_torch(generator):
    conv = CONVS[0]
    x, dy = conv.draw(2, 10, 9, generator, torch.float16)
    store, want = planes(x, CHANNELS), selected(conv, x, dy, CHANNELS)
    low = conv_wgrad_ref(store, dy, Geometry(*conv.geometry), torch.float16)
    assert_no_worse_than(conv_wgrad(store, dy, *conv.geometry, torch.float16), low, want)


@LAYOUTS
def test_opcheck(lay_out, k, generator, monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "torch")
    conv = CONVS[1]
    x, dy = conv.draw(2, 10, 9, generator)
    args = (lay_out(x, CHANNELS), dy, *(list(pair) for pair in conv.geometry), torch.float32, k)
    opcheck(torch.ops.trady.conv_wgrad.default, args)


@LAYOUTS
def test_flop_counter_and_bytes(lay_out, k, generator):
    conv = CONVS[0]
    x, dy = conv.draw(2, 10, 9, generator)
    store = lay_out(x, CHANNELS)
    with FlopCounterMode(display=False) as counter:
        conv_wgrad(store, dy, *conv.geometry, k=k)
    assert counter.get_total_flops() == 2 * (2 * 90) * 9 * 5 * 9
    nbytes = conv_wgrad_bytes(store.shape, dy.shape, 9, itemsize=2, k=k)
    assert nbytes == 2 * 180 * ((5 if k is None else 8) + 9) + 4 * 5 * 9 * 9


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
        ({"store": torch.zeros(3, 9, 10, 8)}, "images of dy"),
        ({"store": torch.zeros(5, 3, 9, 10), "k": None}, "images of dy"),
        ({"store": torch.zeros(2, 9, 10, 8, dtype=torch.float16)}, "wanted contiguous"),
        ({"store": torch.zeros(2, 8, 9, 10).permute(0, 2, 3, 1)}, "strides"),
        ({"k": 9}, "k: got 9"),
        ({"store": torch.zeros(2, 9, 10, 5)}, "a multiple of 8"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    args = {"store": torch.zeros(2, 9, 10, 8), "k": 5} | change
    with pytest.raises(ValueError, match=message):
        conv_wgrad(args["store"], torch.zeros(2, 9, 9, 10), *CONVS[0].geometry, k=args["k"])


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [56, 14, 7])
def test_device_equals_float64_and_repeats(size, channels_last, generator):
    conv = Conv("3x3", (size, size), (3, 3), padding=(1, 1))
    x, dy = (t.cuda() for t in conv.draw(8, 24, 72, generator, torch.bfloat16, channels_last=channels_last))
    store = pixel_major(x, range(24))
    out = conv_wgrad(store, dy, *conv.geometry, k=24)
    assert relative_error(out, selected(conv, x, dy, list(range(24)))) <= 1e-5
    for _ in range(100):
        assert torch.equal(conv_wgrad(store, dy, *conv.geometry, k=24), out)
