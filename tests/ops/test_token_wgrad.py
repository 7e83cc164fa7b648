"""The weight gradient of Linear and 1x1 convolutions equals the definition, whatever the layout, size and split."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.numerics import GuardedArena, assert_finite, assert_no_worse_than, relative_error
from trady_triton.ops import token_matmul
from trady_triton.ops.dequantize import dequantize_channels_ref
from trady_triton.ops.quantize import quantize_channels_ref
from trady_triton.ops.tile import dot_precision
from trady_triton.ops.token_layout import out_of_int32
from trady_triton.ops.token_wgrad import token_wgrad, token_wgrad_ref

module = importlib.import_module("trady_triton.ops.token_wgrad")  # the package has a function of that name

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["tokens", "nchw", "channels_last"]
FEW = settings(max_examples=10, deadline=None, derandomize=True)


def make(layout, K, N, pixels, O, dtype=torch.float32, generator=None):
    """(store [K, T] with padded rows, dy, channel_dim) for N images of `pixels` (height, width) pixels."""
    T = N * pixels[0] * pixels[1]
    rows = torch.full((K, (T + 7) // 8 * 8), float("nan"), dtype=dtype)
    rows[:, :T] = torch.randn(K, T, generator=generator)
    dy = torch.randn(N, O, *pixels, generator=generator).to(dtype)
    if layout == "tokens":
        return rows[:, :T], dy.permute(0, 2, 3, 1).contiguous(), -1
    return rows[:, :T], dy.to(memory_format=torch.channels_last) if layout == "channels_last" else dy, 1


def definition(store, dy, channel_dim):
    tokens = dy.double().movedim(channel_dim, -1).reshape(store.shape[1], dy.shape[channel_dim])
    return store.double() @ tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_definition_inside_poisoned_memory(layout, dtype, generator):
    store, dy, channel_dim = make(layout, 5, 3, (9, 15), 40, dtype, generator)
    with GuardedArena() as arena:
        out = token_wgrad(arena.place(store), arena.place(dy), channel_dim)
    expected = definition(store, dy, channel_dim)
    assert_finite(out)
    assert out.dtype == torch.float32
    assert relative_error(out, expected) <= 2e-6
    assert_no_worse_than(out, token_wgrad_ref(store, dy, channel_dim), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("K", "N", "pixels", "O"),
    [
        (0, 2, (3, 3), 8),
        (1, 1, (1, 1), 1),
        (1, 2, (5, 7), 33),
        (33, 1, (7, 7), 1),
        (17, 2, (16, 16), 70),
        (3, 0, (2, 2), 4),
    ],
)
def test_edges_of_every_size(layout, K, N, pixels, O, generator):
    store, dy, channel_dim = make(layout, K, N, pixels, O, generator=generator)
    with GuardedArena() as arena:
        out = token_wgrad(arena.place(store), arena.place(dy), channel_dim)
    expected = definition(store, dy, channel_dim)
    assert out.shape == (K, O)
    assert_no_worse_than(out, expected, expected, tiny=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_twin_equals_the_definition(layout, dtype, generator):
    store, dy, channel_dim = make(layout, 6, 4, (5, 5), 9, dtype, generator)
    assert relative_error(token_wgrad_ref(store, dy, channel_dim), definition(store, dy, channel_dim)) <= 2e-6


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_many_channels_of_few_pixels_are_the_sum_over_the_images(memory_format, generator):
    store = torch.randn(40, 3 * 4, dtype=torch.float64, generator=generator)
    dy = torch.randn(3, 5, 2, 2, dtype=torch.float64, generator=generator).contiguous(memory_format=memory_format)
    wanted = torch.einsum("knp,nop->ko", store.view(40, 3, 4), dy.flatten(2))
    torch.testing.assert_close(token_wgrad_ref(store, dy, 1, out_dtype=torch.float64), wanted)


def test_the_twin_multiplies_in_bounded_parts(monkeypatch, generator):
    monkeypatch.setattr(token_matmul, "MAX_WORKSPACE_BYTES", 4 * 6 * 9 * 2)
    for dtype in (torch.float32, torch.bfloat16):
        for layout in LAYOUTS:
            store, dy, channel_dim = make(layout, 6, 5, (3, 3), 9, dtype, generator)
            assert relative_error(token_wgrad_ref(store, dy, channel_dim), definition(store, dy, channel_dim)) <= 2e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ones_row_is_the_bias_gradient(layout, generator):
    store, dy, channel_dim = make(layout, 16, 2, (6, 7), 12, generator=generator)
    out = token_wgrad(store, dy, channel_dim, ones_row=True)
    bias = dy.double().movedim(channel_dim, -1).flatten(0, -2).sum(0)
    alone = token_wgrad(store, dy, channel_dim)  # BLAS, below the interpreter, sums rows by place
    assert relative_error(out[:16], alone.double()) <= 2e-6
    assert relative_error(out[16], bias) <= 2e-6
    assert torch.allclose(token_wgrad_ref(store, dy, channel_dim, ones_row=True), out, atol=1e-4)


@pytest.mark.parametrize("ones_row", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_stores_give_the_gradient_of_what_they_hold(bits, layout, dtype, ones_row, generator):
    store, dy, channel_dim = make(layout, 5, 2, (9, 17), 40, dtype, generator)
    channels = torch.arange(5, dtype=torch.int32)
    codes, scale, zero = quantize_channels_ref(store.t(), channels, "tokens", bits, (1, 1), None)
    held = dequantize_channels_ref(codes, scale, zero, "tokens", bits, store.shape, torch.float64)
    with GuardedArena() as arena:
        quantised = {"scale": arena.place(scale), "zero": arena.place(zero), "bits": bits}
        out = token_wgrad(arena.place(codes), arena.place(dy), channel_dim, **quantised, ones_row=ones_row)
    # the interpreter truncates to bf16 where a device rounds
    assert relative_error(out[:5], definition(held, dy, channel_dim)) <= (2e-6 if dtype == torch.float32 else 6e-3)
    apart = {name: torch.stack([quantised[name], quantised[name] + 9], 2)[..., 0] for name in ("scale", "zero")}
    assert torch.equal(token_wgrad(codes, dy, channel_dim, **{**quantised, **apart}, ones_row=ones_row), out)
    twin = token_wgrad_ref(codes, dy, channel_dim, **quantised, ones_row=ones_row)
    assert torch.allclose(twin, out, rtol=1e-2, atol=0.2 if dtype != torch.float32 else 1e-3)


def test_gradients_of_irregular_strides_are_read_correctly(generator):
    store, dy, _ = make("nchw", 4, 2, (6, 8), 10, generator=generator)
    views = [dy[:, :, ::2], dy[:, ::3], dy.transpose(2, 3), dy[1:, :, 1:5, 2:6], dy[:, :1].expand(-1, 10, -1, -1)]
    for view in views:
        part = store[:, : view.numel() // view.shape[1]]
        assert relative_error(token_wgrad(part, view, 1), definition(part, view, 1)) <= 2e-6


@FEW
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.integers(1, 40), st.sampled_from(LAYOUTS))
def test_any_small_size_equals_the_definition(K, N, side, O, layout):
    store, dy, channel_dim = make(layout, K, N, (side, side + 1), O)
    assert relative_error(token_wgrad(store, dy, channel_dim), definition(store, dy, channel_dim)) <= 2e-6


@FEW
@given(st.integers(2, 20), st.integers(1, 19), st.integers(1, 200), st.sampled_from(LAYOUTS))
def test_disjoint_unions_concatenate_and_permutations_permute(K, cut, T, layout):
    store, dy, channel_dim = make(layout, K, 2, (1, T), 12)
    whole = token_wgrad(store, dy, channel_dim)
    parts = [token_wgrad(part, dy, channel_dim) for part in (store[:cut], store[cut:])]
    order = torch.randperm(K)
    shuffled = torch.empty(K, store.stride(0))[:, : store.shape[1]].copy_(store[order])
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-5, atol=1e-4)
    assert torch.allclose(token_wgrad(shuffled, dy, channel_dim), whole[order], rtol=1e-5, atol=1e-4)


@FEW
@given(st.floats(-3, 3), st.sampled_from(LAYOUTS))
def test_linear_in_both_operands(scale, layout):
    store, dy, channel_dim = make(layout, 5, 2, (8, 8), 12)
    store2, dy2, _ = make(layout, 5, 2, (8, 8), 12)
    out, out_dy2, out_store2 = (
        token_wgrad(*operands, channel_dim) for operands in ((store, dy), (store, dy2), (store2, dy))
    )
    assert torch.allclose(token_wgrad(store, dy + scale * dy2, channel_dim), out + scale * out_dy2, atol=1e-4)
    assert torch.allclose(token_wgrad(store + scale * store2, dy, channel_dim), out + scale * out_store2, atol=1e-4)


@pytest.mark.parametrize("split", [1, 2, 5, 32])
@pytest.mark.parametrize("BK", [16, 64])
def test_split_and_block_size_do_not_matter(split, BK, monkeypatch, generator):
    store, dy, channel_dim = make("nchw", 9, 4, (12, 12), 20, generator=generator)
    config = module.Config({"BM": 16, "BN": 32, "BK": BK}, split=split)
    monkeypatch.setattr(module, "select_config", lambda *_: config)
    assert relative_error(token_wgrad(store, dy, channel_dim), definition(store, dy, channel_dim)) <= 2e-6


def test_atomics_only_on_request(monkeypatch, generator):
    store, dy, channel_dim = make("tokens", 9, 4, (20, 20), 20, generator=generator)
    used = []
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda *a, **k: used.append(k["ATOMIC"]) or launch(*a, **k))
    first = token_wgrad(store, dy, channel_dim)
    added = token_wgrad(store, dy, channel_dim, deterministic=False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    forced = token_wgrad(store, dy, channel_dim, deterministic=False)
    assert used == [False, True, False]
    assert torch.equal(first, forced)
    assert torch.allclose(first, added, atol=1e-4)


def test_wide_addresses_give_the_same_result(monkeypatch, generator):
    store, dy, channel_dim = make("nchw", 9, 4, (6, 6), 20, generator=generator)
    narrow = token_wgrad(store, dy, channel_dim)
    monkeypatch.setattr(module, "out_of_int32", lambda *_: True)
    assert torch.equal(token_wgrad(store, dy, channel_dim), narrow)


@pytest.mark.parametrize("layout", ["tokens", "nchw"])
def test_opcheck(layout):
    store, dy, channel_dim = make(layout, 3, 2, (4, 5), 6)
    arguments = (store, dy, None, None, 0, channel_dim, torch.float32, True, True)
    torch.library.opcheck(torch.ops.trady.token_wgrad.default, arguments)


def test_flops_are_counted():
    store, dy, channel_dim = make("nchw", 3, 2, (4, 5), 6)
    with FlopCounterMode(display=False) as counter:
        token_wgrad(store, dy, channel_dim)
    assert counter.get_total_flops() == 2 * 3 * 40 * 6


def test_the_result_has_the_requested_dtype(generator):
    store, dy, channel_dim = make("tokens", 3, 4, (20, 20), 6, torch.bfloat16, generator)
    low = token_wgrad(store, dy, channel_dim, out_dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert relative_error(low, definition(store, dy, channel_dim)) <= 2**-7


@pytest.mark.parametrize(
    ("store", "dy", "channel_dim", "name"),
    [
        (torch.ones(2, 9), torch.ones(10, 3), -1, "store"),
        (torch.ones(2, 10).bfloat16(), torch.ones(10, 3), -1, "store"),
        (torch.ones(10, 2).t(), torch.ones(10, 3), -1, "store"),
        (torch.ones(2, 10), torch.ones(10, 3), 0, "channel_dim"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(store, dy, channel_dim, name):
    with pytest.raises(ValueError, match=name):
        token_wgrad(store, dy, channel_dim)


@pytest.mark.parametrize("name", ["scale", "zero"])
def test_ranges_of_another_size_are_refused(name):
    ranges = {"scale": torch.ones(2, 2), "zero": torch.ones(2, 2), name: torch.ones(2, 1)}
    with pytest.raises(ValueError, match=rf"{name}: got \(2, 1\), wanted \(2, 2\)"):
        token_wgrad(torch.zeros(2, 200, dtype=torch.uint8), torch.ones(200, 3), **ranges, bits=8)


def test_offsets_have_64_bits_where_memory_is_larger_than_32_reach():
    with FakeTensorMode():
        assert not out_of_int32(torch.empty(1 << 15, (1 << 16) - 1, dtype=torch.bfloat16))
        assert out_of_int32(torch.empty(3), torch.empty(1 << 15, 1 << 16, dtype=torch.bfloat16))
        assert not out_of_int32(torch.empty(1).expand(1 << 15, 1 << 16))


def test_a_single_image_in_planes_gets_the_tiles_of_planes(monkeypatch):
    """Wide tiles of a gradient that does not lie channel by channel would need more registers than there are."""
    module, asked = importlib.import_module("trady_triton.ops.token_wgrad"), []
    real = module.select_config
    monkeypatch.setattr(module, "select_config", lambda op, shape, *rest: asked.append(shape) or real(op, shape, *rest))
    for N, layout in ((2, "nchw"), (1, "nchw"), (1, "channels_last"), (1, "tokens")):
        token_wgrad(*make(layout, 3, N, (5, 7), 6))
    assert [shape["PQ"] for shape in asked] == [35, 35, 1, 1]


@pytest.mark.parametrize("newer", [False, True])
def test_fp32_products_take_tf32_where_those_of_torch_do_by_either_name(newer):
    try:
        for precision, wanted in (("high", "tf32"), ("highest", "ieee")):
            if newer:
                torch.backends.cuda.matmul.fp32_precision = wanted
            else:
                torch.set_float32_matmul_precision(precision)
            assert dot_precision(torch.float32) == wanted
            assert dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("K", "side", "O"), [(8, 56, 144), (48, 14, 768), (192, 7, 100), (16, 15, 64)])
def test_on_a_device_equals_the_definition_100_times_bit_for_bit(layout, dtype, K, side, O):
    store, dy, channel_dim = (
        x.cuda() if isinstance(x, torch.Tensor) else x for x in make(layout, K, 8, (side, side), O, dtype)
    )
    torch.set_float32_matmul_precision("highest")
    out = token_wgrad(store, dy, channel_dim)
    assert relative_error(out, definition(store, dy, channel_dim)) <= 1e-5
    assert all(torch.equal(token_wgrad(store, dy, channel_dim), out) for _ in range(100))
