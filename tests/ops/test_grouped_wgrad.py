"""The compact gradient of a grouped or depthwise convolution is the slice of the float64 gradient for its channels."""

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
from trady_triton.ops import select_config
from trady_triton.ops.conv_geometry import Geometry
from trady_triton.ops.grouped_wgrad import grouped_wgrad, grouped_wgrad_bytes, grouped_wgrad_ref

module = importlib.import_module("trady_triton.ops.grouped_wgrad")  # the package has a function of that name

FP32_SUM = 2e-6  # inputs are exact in their dtype and products are added in fp32
CHANNELS = [0, 2, 3, 5]
GROUPS = {"depthwise": (1, 1), "depthwise, 3 outputs": (1, 3), "2 to 2": (2, 2), "3 to 10": (3, 10)}  # (C / G, O / G)
IN_CHANNELS = 6


def planes(x, channels):
    """The store [K, N, H, W]."""
    return x[:, channels].transpose(0, 1).contiguous()


def ids(channels):
    return torch.tensor(channels, dtype=torch.int32)


def selected(conv, x, dy, channels, group):
    """[K, M, R, S] in float64: of channel c, the rows of its own group."""
    dense = conv.dense_wgrad64(x, dy, groups=x.shape[1] // group[0])
    rows = [dense[c // group[0] * group[1] :][: group[1], c % group[0]] for c in channels]
    return torch.stack(rows)


def draw(conv, group, generator, dtype=torch.float32, N=2, channels_last=False):
    groups = IN_CHANNELS // group[0]
    return conv.draw(N, IN_CHANNELS, groups * group[1], generator, dtype, groups, channels_last)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("conv", CONVS, ids=lambda conv: conv.name)
def test_kernel_equals_float64_between_poisoned_margins(conv, group, channels_last, generator):
    x, dy = draw(conv, group, generator, torch.float16, channels_last=channels_last)
    with GuardedArena() as arena:
        out = grouped_wgrad(arena.place(planes(x, CHANNELS)), arena.place(dy), ids(CHANNELS), group, *conv.geometry)
    assert_finite(out)
    assert relative_error(out, selected(conv, x, dy, CHANNELS, group)) <= FP32_SUM


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_dtype_equals_float64(dtype, group, generator):
    x, dy = draw(CONVS[0], group, generator, dtype)
    out = grouped_wgrad(planes(x, CHANNELS), dy, ids(CHANNELS), group, *CONVS[0].geometry)
    assert relative_error(out, selected(CONVS[0], x, dy, CHANNELS, group)) <= FP32_SUM


@pytest.mark.parametrize(
    "conv",
    [
        Conv("tiles of 32 outputs", (3, 70), (3, 7), padding=(1, 3)),
        Conv("tiles of 32 outputs, stride 2", (3, 90), (3, 5), stride=(2, 2), padding=(1, 2)),
        Conv("tiles of 32 outputs, no padding", (3, 80), (2, 3), stride=(1, 2), dilation=(1, 4)),
        Conv("too wide for the diagonals", (2, 700), (1, 3), padding=(0, 130), dilation=(1, 130)),
    ],
    ids=lambda conv: conv.name,
)
def test_wide_depthwise_equals_float64(conv, generator):
    x, dy = draw(conv, (1, 1), generator, N=1)
    with GuardedArena() as arena:
        out = grouped_wgrad(arena.place(planes(x, [1, 4])), arena.place(dy), ids([1, 4]), (1, 1), *conv.geometry)
    assert relative_error(out, selected(conv, x, dy, [1, 4], (1, 1))) <= FP32_SUM


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("group", [(1, 1), (3, 10)])
@pytest.mark.parametrize("conv", [CONVS[0], CONVS[3], CONVS[6]], ids=lambda conv: conv.name)
def test_codes_give_the_gradient_of_what_they_stand_for(conv, group, backend, generator, monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", backend)
    x, dy = draw(conv, group, generator)
    codes = torch.randint(256, planes(x, CHANNELS).shape, generator=generator, dtype=torch.uint8)
    scale, zero = torch.rand(2, 4, 2, generator=generator).bfloat16()
    meant = codes * scale.double()[..., None, None] + zero.double()[..., None, None]
    x = x.double().index_copy(1, torch.tensor(CHANNELS), meant.transpose(0, 1))
    with GuardedArena() as arena:
        codes, scale, zero = (arena.place(t) for t in (codes, scale, zero))
        out = grouped_wgrad(codes, dy, ids(CHANNELS), group, *conv.geometry, scale=scale, zero=zero)
    assert relative_error(out, selected(conv, x, dy, CHANNELS, group)) <= FP32_SUM


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("conv", CONVS, ids=lambda conv: conv.name)
def test_twin_equals_float64(conv, group, generator, monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "torch")
    x, dy = draw(conv, group, generator, torch.float64)
    out = grouped_wgrad(planes(x, CHANNELS), dy, ids(CHANNELS), group, *conv.geometry, torch.float64)
    torch.testing.assert_close(out, selected(conv, x, dy, CHANNELS, group), rtol=1e-12, atol=1e-12)


@st.composite
def convolutions(draw):
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    kernel_size, dilation, padding, more = pair(1, 5), pair(1, 3), pair(0, 4), pair(1, 6)
    reach = [d * (r - 1) + 1 for r, d in zip(kernel_size, dilation, strict=True)]
    size = tuple(max(1, need - 2 * p) + m for need, p, m in zip(reach, padding, more, strict=True))
    return Conv("drawn", size, kernel_size, pair(1, 4), padding, dilation, pair(0, 1))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(convolutions(), st.sampled_from(list(GROUPS.values())), st.booleans())
def test_any_geometry_equals_float64(conv, group, channels_last):
    x, dy = draw(conv, group, torch.Generator().manual_seed(0), channels_last=channels_last)
    out = grouped_wgrad(planes(x, CHANNELS), dy, ids(CHANNELS), group, *conv.geometry)
    assert relative_error(out, selected(conv, x, dy, CHANNELS, group)) <= FP32_SUM


@pytest.mark.parametrize("M", [1, 10])
@pytest.mark.parametrize("split", [1, 2, 5])
def test_splits_do_not_change_the_result(split, M, generator, monkeypatch):
    conv, x_and_dy = CONVS[0], draw(CONVS[0], (1, M), generator)
    meta = {"RB": 2, "BQ": 16, "BW": 16, "BACK": 0, "BK": 16} if M == 1 else {"BM": 16, "BN": 16, "BK": 16}
    kernel = "depthwise_wgrad" if M == 1 else "grouped_wgrad"
    monkeypatch.setitem(select_config.RULES, kernel, lambda *_: select_config.Config(meta, split=split))
    x, dy = x_and_dy
    with GuardedArena() as arena:
        out = grouped_wgrad(arena.place(planes(x, CHANNELS)), arena.place(dy), ids(CHANNELS), (1, M), *conv.geometry)
    assert relative_error(out, selected(conv, x, dy, CHANNELS, (1, M))) <= FP32_SUM


@pytest.mark.parametrize("conv", CONVS[:4], ids=lambda conv: conv.name)
def test_both_kernels_agree_on_depthwise(conv, generator, monkeypatch):
    x, dy = draw(conv, (1, 1), generator)
    args = (planes(x, CHANNELS), dy, ids(CHANNELS), (1, 1), *conv.geometry)
    diagonals = grouped_wgrad(*args)
    monkeypatch.setattr(module, "MAX_DIAGONAL_OUTPUTS", 0)
    assert relative_error(grouped_wgrad(*args), diagonals.double()) <= FP32_SUM


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("channels", [[], [4], [5, 0, 3], list(range(IN_CHANNELS))], ids=len)
def test_any_channels_in_any_order(channels, group, generator):
    conv = CONVS[1]
    x, dy = draw(conv, group, generator)
    out = grouped_wgrad(planes(x, channels), dy, ids(channels).long(), group, *conv.geometry)
    assert out.shape == (len(channels), group[1], 3, 3)
    assert not channels or relative_error(out, selected(conv, x, dy, channels, group)) <= FP32_SUM


@pytest.mark.parametrize("kind", ["expanded", "slice"])
def test_strided_dy_gives_the_same(kind, generator):
    conv = CONVS[1]
    x, dy = draw(conv, (1, 1), generator)
    strided = dy[:, :, :1, :1].expand_as(dy) if kind == "expanded" else torch.cat([dy, dy], 3)[..., : dy.shape[3]]
    out, want = (
        grouped_wgrad(planes(x, CHANNELS), d, ids(CHANNELS), (1, 1), *conv.geometry)
        for d in (strided, strided.contiguous())
    )
    assert torch.equal(out, want)


@pytest.mark.parametrize("group", [(1, 1), (3, 10)])
def test_ids_and_scales_at_a_stride_are_read_as_they_are(group, generator):
    conv = CONVS[0]
    x, dy = draw(conv, group, generator)
    codes = planes(x, CHANNELS).mul(50).to(torch.uint8)
    strided = ids([channel for c in CHANNELS for channel in (c, 4)])[::2]
    scale, zero = (torch.rand(2, 4, generator=generator).bfloat16().t() for _ in range(2))
    out, want = (
        grouped_wgrad(codes, dy, channels, group, *conv.geometry, scale=scale, zero=zero)
        for channels, scale, zero in ((strided, scale, zero), (ids(CHANNELS), scale.contiguous(), zero.contiguous()))
    )
    assert torch.equal(out, want)


def test_no_image_gives_zeros():
    args = torch.empty(2, 0, 4, 4), torch.empty(0, 6, 4, 4), ids([0, 3]), (1, 1)
    assert torch.equal(grouped_wgrad(*args, *CONVS[0].geometry), torch.zeros(2, 1, 3, 3))


@pytest.mark.parametrize("group", [(1, 1), (3, 10)])
def test_rounded_result_is_as_good_as_torch(group, generator):
    conv = CONVS[0]
    x, dy = draw(conv, group, generator, torch.float16)
    args = (planes(x, CHANNELS), dy, ids(CHANNELS), group)
    low = grouped_wgrad_ref(*args, Geometry(*conv.geometry), torch.float16)
    assert_no_worse_than(
        grouped_wgrad(*args, *conv.geometry, torch.float16), low, selected(conv, x, dy, CHANNELS, group)
    )


def test_opcheck(generator, monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "torch")
    conv = CONVS[1]
    x, dy = draw(conv, (2, 2), generator)
    geometry = [list(pair) for pair in conv.geometry]
    args = (planes(x, CHANNELS), dy, ids(CHANNELS), None, None, [2, 2], *geometry, torch.float32)
    opcheck(torch.ops.trady.grouped_wgrad.default, args)


def test_flop_counter_and_bytes(generator):
    conv = CONVS[0]
    x, dy = draw(conv, (2, 2), generator)
    with FlopCounterMode(display=False) as counter:
        grouped_wgrad(planes(x, CHANNELS), dy, ids(CHANNELS), (2, 2), *conv.geometry)
    assert counter.get_total_flops() == 2 * (2 * 90) * 9 * 4 * 2
    depthwise = grouped_wgrad_bytes((4, 2, 9, 10), (2, 6, 9, 10), 1, 9, itemsize=2)
    assert depthwise == 2 * 180 * (4 + 4) + 4 * 4 * 9


def test_rules_stay_within_the_limits():
    rng = random.Random(0)
    arch = select_config.Arch("sm_90")
    for _ in range(10_000):
        R, Q = rng.randint(1, 11), rng.randint(1, 256)
        stride = rng.randint(1, 4)
        shape = {
            "ROWS": rng.randint(1, 2048), "N": rng.randint(1, 512), "W": Q * stride, "P": Q, "Q": Q, "R": R, "S": R,
            "STRIDE_W": stride, "LEFT": rng.randint(0, R), "DILATION_W": rng.randint(1, 4),
        }  # fmt: skip
        dtype = rng.choice([torch.float32, torch.bfloat16])
        config = select_config.select_config("depthwise_wgrad", shape, dtype, arch)
        if config.backend == "taps":
            shape = {"K": shape["ROWS"], "M": 1, "TAPS": R * R, "T": shape["N"] * Q * Q}
            config = select_config.select_config("grouped_wgrad", shape, dtype, arch)
            tile, rows = config.meta["BM"] * config.meta["BN"], shape["K"]
        else:
            tile, rows = config.meta["BQ"] * config.meta["RB"] * config.meta["BW"], shape["ROWS"]
        assert tile / (32 * config.num_warps) <= select_config.MAX_ACCUMULATORS_PER_THREAD
        assert config.split == 1 or 4 * config.split * rows * R * R <= select_config.MAX_WORKSPACE_BYTES
        assert rows * R * R * config.split <= select_config.MAX_PROGRAMS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3, 9, 10)}, "images of dy"),
        ({"x": torch.zeros(4, 2, 9, 10, dtype=torch.float16)}, "wanted contiguous"),
        ({"channels": ids([1, 2])}, "channels: got"),
        ({"group": (1, 4)}, "group: got 4"),
        ({"x": torch.zeros(4, 2, 9, 10, dtype=torch.uint8), "scale": torch.ones(4, 2)}, "one of them"),
        (
            {"x": torch.zeros(4, 2, 9, 10, dtype=torch.uint8), "scale": torch.ones(4), "zero": torch.ones(4)},
            "scale: got",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    good = {"x": torch.zeros(4, 2, 9, 10), "dy": torch.zeros(2, 6, 9, 10), "channels": ids(CHANNELS), "group": (1, 1)}
    geometry = dict(zip(("kernel_size", "stride", "padding", "dilation"), CONVS[0].geometry, strict=True))
    with pytest.raises(ValueError, match=message):
        grouped_wgrad(**(good | geometry | change))


@pytest.mark.gpu
@pytest.mark.parametrize("group", [(1, 1), (4, 4), (16, 16)], ids=str)
@pytest.mark.parametrize("size", [112, 56, 14, 7])
def test_device_equals_float64_and_repeats(size, group, generator):
    conv = Conv("5x5", (size, size), (5, 5), padding=(2, 2))
    x, dy = (t.cuda() for t in conv.draw(8, 48, 48, generator, torch.bfloat16, 48 // group[0]))
    channels = list(range(0, 48, 3))
    args = (planes(x, channels), dy, ids(channels).cuda(), group, *conv.geometry)
    out = grouped_wgrad(*args)
    assert relative_error(out, selected(conv, x, dy, channels, group)) <= 1e-5
    for _ in range(100):
        assert torch.equal(grouped_wgrad(*args), out)
