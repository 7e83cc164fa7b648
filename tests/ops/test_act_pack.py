"""Packed activation derivatives: exact in 1 bit, within half a step in 8, the nearest level in 2; in storage order."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from tests.ops.numerics import GuardedArena, assert_no_worse_than
from trady_triton.ops.act_pack import act_pack, act_pack_, act_pack_ref, act_unpack, act_unpack_ref, code_bytes
from trady_triton.ops.activation import EXACT, SMOOTH, bounds

FUNCTIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["triton", "torch"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", request.param)
    return request.param


def special(dtype, generator):
    """Random values with the corners of every activation among them."""
    corners = torch.tensor(
        [0.0, -0.0, 6.0, -1.0, 1.0, 3.0, -3.0, 1e-30, -1e-30, 1e4, -1e4, float("inf"), -float("inf")]
    )
    return torch.cat([4 * torch.randn(2085, generator=generator), corners]).to(dtype)


def gradient(kind, x, dy):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(FUNCTIONS[kind](x), x, dy)[0]


def test_double_precision_has_the_limits_it_was_given(generator, monkeypatch):
    """Triton passes a Python number as float32: 0.1 would be another."""
    monkeypatch.setattr(importlib.import_module("trady_triton.ops.act_pack"), "launch", None)
    x = torch.randn(50, dtype=torch.float64, generator=generator)
    y, code = act_pack(x, "hardtanh", 1, -0.1, 0.1)
    assert torch.equal(y, F.hardtanh(x, -0.1, 0.1))
    assert torch.equal(act_unpack(x, code, "hardtanh", 1, x.stride()), x * (x.abs() < 0.1))
    code = act_pack_(x, "hardtanh", 1, -0.1, 0.1)
    assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", EXACT)
def test_one_bit_forward_and_backward_equal_torch(kind, dtype, backend, generator):
    x = special(dtype, generator)
    dy = torch.randn(x.shape, generator=generator).to(dtype)
    y, code = act_pack(x, kind, 1)
    dx = act_unpack(dy, code, kind, 1, y.stride())
    if kind == "hardsigmoid":  # x / 6 and x * (1 / 6) may differ in the last bit; the interpreter truncates bf16
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y, F.hardsigmoid(x), rtol=eps, atol=eps)
        torch.testing.assert_close(dx, gradient(kind, x, dy), rtol=eps, atol=eps)
    else:
        assert torch.equal(y, FUNCTIONS[kind](x))
        assert torch.equal(dx, gradient(kind, x, dy))


@pytest.mark.parametrize("kind", ["relu", "relu6", "hardtanh"])
def test_nan_passes_as_in_torch(kind, backend):
    x, dy = torch.tensor([float("nan"), 1.0, -1.0]), torch.tensor([2.0, 3.0, float("nan")])
    y, code = act_pack(x, kind, 1)
    dx = act_unpack(dy, code, kind, 1, y.stride())
    torch.testing.assert_close(y, FUNCTIONS[kind](x), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(dx, gradient(kind, x, dy), equal_nan=True, rtol=0, atol=0)


def test_hardtanh_takes_its_own_bounds(backend, generator):
    x, dy = torch.randn(2, 77, generator=generator)
    y, code = act_pack(x, "hardtanh", 1, -0.5, 0.25)
    assert torch.equal(y, F.hardtanh(x, -0.5, 0.25))
    inside = (x > -0.5) & (x < 0.25)
    assert torch.equal(act_unpack(dy, code, "hardtanh", 1, y.stride()), dy * inside)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1023, 1025])
@pytest.mark.parametrize(("kind", "bits"), [("relu", 1), ("gelu", 2), ("gelu", 8)])
def test_kernel_and_twin_pack_the_same_bytes(kind, bits, n, generator):
    x = torch.randn(n, generator=generator)
    with GuardedArena() as arena:
        y, code = act_pack(arena.place(x), kind, bits)
    low, high = bounds(kind, None, None)
    y_ref, code_ref = act_pack_ref(x, kind, bits, low, high, None)
    assert code.numel() == code_bytes(n, bits)
    assert torch.equal(code, code_ref)
    torch.testing.assert_close(y, y_ref)


@pytest.mark.parametrize(("kind", "bits"), [("relu6", 1), ("silu", 2), ("hardswish", 8)])
def test_twin_and_kernel_unpack_each_other(kind, bits, generator):
    x, dy = torch.randn(2, 3, 37, generator=generator)
    y, code = act_pack(x, kind, bits)
    ours, twin = act_unpack(dy, code, kind, bits, y.stride()), act_unpack_ref(dy, code, kind, bits, y.stride())
    torch.testing.assert_close(ours, twin)


@pytest.mark.parametrize(("kind", "bits"), [("relu", 1), ("gelu", 8), ("gelu", 2)])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "permuted", "slice"])
def test_any_layout_of_input_and_gradient_gives_the_same_result(memory, kind, bits, backend, generator):
    plain = torch.randn(2, 5, 3, 7, generator=generator)
    x = {
        "contiguous": plain,
        "channels_last": plain.contiguous(memory_format=torch.channels_last),
        "permuted": plain.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "slice": torch.cat([plain, plain], dim=2)[:, :, :3],
    }[memory]
    dy = torch.randn(x.shape, generator=generator)
    y, code = act_pack(x, kind, bits)
    assert code.numel() == code_bytes(x.numel(), bits)
    y_plain, code_plain = act_pack(plain, kind, bits)
    assert torch.equal(y, y_plain)
    assert y.stride() == torch.empty_like(x).stride()
    dx, expected = act_unpack(dy, code, kind, bits, y.stride()), act_unpack(dy, code_plain, kind, bits, plain.stride())
    assert torch.equal(dx, expected)
    assert dx.stride() == y.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SMOOTH)
def test_smooth_forward_is_as_exact_as_torch(kind, dtype, backend, generator):
    x = (4 * torch.randn(999, generator=generator)).to(dtype)
    y, _ = act_pack(x, kind, 8)
    reference = FUNCTIONS[kind](x.double())
    if dtype == torch.bfloat16:  # the interpreter truncates where a device rounds
        torch.testing.assert_close(y.double(), reference, rtol=2**-7, atol=2**-8)
    else:
        assert_no_worse_than(y, FUNCTIONS[kind](x), reference)


@pytest.mark.parametrize("kind", SMOOTH)
def test_eight_bit_derivative_is_within_half_a_step_over_its_whole_range(kind, backend):
    x = torch.linspace(-9, 9, 4097)
    y, code = act_pack(x, kind, 8)
    d = act_unpack(torch.ones_like(x), code, kind, 8, y.stride())
    exact = gradient(kind, x.double(), torch.ones_like(x, dtype=torch.float64))
    assert (d.double() - exact).abs().max() <= 0.5 / SMOOTH[kind].scale + 1e-6


@pytest.mark.parametrize("kind", SMOOTH)
def test_dead_and_saturated_elements_keep_their_derivative_exactly(kind, backend):
    x = torch.tensor([-1e4, -40.0, 40.0, 1e4])
    y, code = act_pack(x, kind, 8)
    d = act_unpack(torch.ones(4), code, kind, 8, y.stride())
    torch.testing.assert_close(d, torch.tensor([0.0, 0.0, 1.0, 1.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", SMOOTH)
def test_two_bits_choose_the_nearest_level(kind, backend, generator):
    x = 3 * torch.randn(1001, generator=generator)
    y, code = act_pack(x, kind, 2)
    d = act_unpack(torch.ones_like(x), code, kind, 2, y.stride())
    exact = gradient(kind, x.double(), torch.ones_like(x, dtype=torch.float64))
    distance = (exact[:, None] - torch.tensor(SMOOTH[kind].levels, dtype=torch.float64)).abs()
    torch.testing.assert_close((d - exact).abs(), distance.min(dim=1).values, rtol=0, atol=1e-5)


def test_stochastic_codes_are_unbiased_and_repeatable(monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "torch")
    x = torch.linspace(-4, 4, 101)
    total = torch.zeros(101, dtype=torch.float64)
    for seed in range(200):
        y, code = act_pack(x, "gelu", 8, seed=torch.tensor([seed]))
        total += act_unpack(torch.ones_like(x), code, "gelu", 8, y.stride())
    exact = gradient("gelu", x.double(), torch.ones_like(x, dtype=torch.float64))
    steps = (total / 200 - exact) * SMOOTH["gelu"].scale
    assert steps.abs().max() < 4.5 * 0.5 / 200**0.5
    assert torch.equal(code, act_pack(x, "gelu", 8, seed=torch.tensor([199]))[1])


def test_stochastic_codes_of_kernel_and_twin_agree(generator):
    x, seed = torch.randn(2077, generator=generator), torch.tensor([12345678901])
    _, code = act_pack(x, "silu", 8, seed=seed)
    _, twin = act_pack_ref(x, "silu", 8, 0.0, 0.0, seed)
    assert (code.int() - twin.int()).abs().max() <= 1
    assert (code != twin).float().mean() < 1e-2


@pytest.mark.parametrize(("kind", "bits"), [("relu6", 1), ("gelu", 8)])
def test_pack_and_unpack_pass_opcheck(kind, bits):
    x = torch.randn(2, 3, 5)
    low, high = bounds(kind, None, None)
    opcheck(torch.ops.trady.act_pack, (x, kind, bits, low, high, None))
    code = torch.zeros(code_bytes(30, bits), dtype=torch.uint8)
    opcheck(torch.ops.trady.act_unpack, (x, code, kind, bits, list(x.stride())))


@pytest.mark.parametrize(
    ("kind", "bits"), [("relu", 1), ("relu6", 1), ("hardsigmoid", 1), ("hardswish", 8), ("silu", 2)]
)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "slice"])
def test_in_place_is_the_same_in_place(memory, kind, bits, backend, generator):
    plain = torch.randn(2, 5, 3, 7, generator=generator)
    x = plain.clone()
    if memory != "contiguous":
        x = x.contiguous(memory_format=torch.channels_last) if memory == "channels_last" else plain.repeat(1, 1, 2, 1)
    x = x[:, :, :3]
    y, code = act_pack(x, kind, bits)
    with GuardedArena():
        assert torch.equal(act_pack_(x, kind, bits), code)
    assert torch.equal(x, y)


def test_in_place_passes_opcheck():
    opcheck(torch.ops.trady.act_pack_, (torch.randn(2, 3, 5), "relu6", 1, 0.0, 6.0, None))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(("mish", 8), "mish"), (("relu", 8), "bits"), (("gelu", 1), "bits"), (("relu", 1, 0.0, 1.0), "bounds")],
)
def test_wrong_arguments_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        act_pack(torch.ones(3), *arguments)


def test_a_seed_for_exact_bits_is_refused():
    with pytest.raises(ValueError, match="seed"):
        act_pack(torch.ones(3), "relu", 1, seed=torch.tensor([1]))


@pytest.mark.parametrize(("kind", "bits"), [("relu6", 1), ("gelu", 8), ("gelu", 2)])
def test_large_tensors_take_the_twin_through_several_chunks(kind, bits, monkeypatch, generator):
    x = 3 * torch.randn((1 << 17) + 77, generator=generator)
    seed = torch.tensor([6]) if bits == 8 else None
    low, high = bounds(kind, None, None)
    _, code = act_pack_ref(x, kind, bits, low, high, seed)
    dx = act_unpack_ref(x, code, kind, bits, x.stride())
    monkeypatch.setattr(sys.modules[act_pack_ref.__module__], "_CHUNK", 1 << 20)
    _, whole = act_pack_ref(x, kind, bits, low, high, seed)
    assert torch.equal(code, whole)
    assert torch.equal(dx, act_unpack_ref(x, whole, kind, bits, x.stride()))
