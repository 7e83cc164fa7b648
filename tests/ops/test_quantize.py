"""The quantised store: error bounds, exactness where promised, unbiased rounding, kernel and twin bit for bit."""

import pytest
import torch
from torch.library import opcheck

from tests.ops.numerics import GuardedArena
from trady_triton.ops.dequantize import dequantize_channels, dequantize_channels_ref
from trady_triton.ops.philox import random16_ref
from trady_triton.ops.quantize import (
    GROUP,
    quantize_channels,
    quantize_channels_ref,
    quantized_bytes,
)
from trady_triton.ops.store import store_channels

IMAGE = (2, 11, 9, 7)
CHANNELS = torch.tensor([0, 3, 4, 9, 10], dtype=torch.int32)
CASES = [  # layout, shape of x, stride
    ("tokens", (3, 111, 11), (1, 1)),
    ("tokens", (40, 11), (1, 1)),
    ("pixels", (2, 11, 20, 15), (2, 1)),
    ("planes", IMAGE, (1, 1)),
]
cases = pytest.mark.parametrize(("layout", "shape", "stride"), CASES)
both_bits = pytest.mark.parametrize("bits", [8, 4])


def sample(shape, generator, dtype=torch.float32):
    """Skewed values, so that a wrong group shows."""
    x = torch.randn(shape, generator=generator)
    return (x.abs() * torch.rand(shape, generator=generator) * 7 + torch.randn(shape[0], *[1] * (len(shape) - 1))).to(
        dtype
    )


def round_trip(x, layout, bits, stride, seed=None, channels=CHANNELS):
    """(dequantised store, scale of every element's group, plain store)."""
    store = store_channels(x, channels, layout, stride)
    codes, scale, zero = quantize_channels(x, channels, layout, bits, stride, seed)
    values = dequantize_channels(codes, scale, zero, layout, bits, store.shape, torch.float32)
    zeros = torch.zeros_like(zero)
    ones = torch.full_like(codes, 1 if bits == 8 else 17)
    return values, dequantize_channels(ones, scale, zeros, layout, bits, store.shape, torch.float32), store


@both_bits
@cases
def test_nearest_rounding_errs_by_half_a_step_at_most(layout, shape, stride, bits, generator):
    values, step, store = round_trip(sample(shape, generator), layout, bits, stride)
    assert ((values - store).abs() <= 0.5001 * step + 1e-6).all()


@both_bits
@cases
def test_stochastic_rounding_errs_by_less_than_a_step(layout, shape, stride, bits, generator):
    values, step, store = round_trip(sample(shape, generator), layout, bits, stride, torch.tensor([5]))
    assert ((values - store).abs() <= 1.0001 * step + 1e-6).all()


@both_bits
@cases
def test_a_step_is_hardly_larger_than_the_range_of_its_group_needs(layout, shape, stride, bits, generator):
    x = sample(shape, generator)
    _, step, store = round_trip(x, layout, bits, stride)
    largest = store.amax() - store.amin()
    assert step.amax() <= 1.02 * largest / (2**bits - 1) + 0.02 * store.abs().amax() / (2**bits - 1)


@both_bits
@cases
@pytest.mark.parametrize("seed", [None, 77])
def test_kernel_and_twin_agree_bit_for_bit(layout, shape, stride, bits, seed, generator):
    x = sample(shape, generator)
    seed = None if seed is None else torch.tensor([seed])
    with GuardedArena() as arena:
        ours = quantize_channels(arena.place(x), CHANNELS, layout, bits, stride, seed)
    twin = quantize_channels_ref(x, CHANNELS, layout, bits, stride, seed)
    for out, ref in zip(ours, twin, strict=True):
        assert torch.equal(out, ref)
        assert out.stride() == ref.stride()
    size = store_channels(x, CHANNELS, layout, stride).shape
    with GuardedArena() as arena:
        store = dequantize_channels(*(arena.place(t) for t in ours), layout, bits, size, torch.float32)
    assert torch.equal(store, dequantize_channels_ref(*twin, layout, bits, size, torch.float32))


@both_bits
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("layout", ["pixels", "planes"])
def test_codes_do_not_depend_on_the_memory_format(layout, memory_format, bits, generator):
    x = sample(IMAGE, generator)
    ours = quantize_channels(x.contiguous(memory_format=memory_format), CHANNELS, layout, bits)
    for out, ref in zip(ours, quantize_channels_ref(x, CHANNELS, layout, bits, (1, 1), None), strict=True):
        assert torch.equal(out, ref)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_input_is_quantised_as_its_fp32_values(dtype, generator):
    x = sample((2, 150, 11), generator, dtype)
    twin = quantize_channels_ref(x.float(), CHANNELS, "tokens", 8, (1, 1), None)
    for out, ref in zip(quantize_channels(x, CHANNELS, "tokens", 8), twin, strict=True):
        assert torch.equal(out, ref)


@both_bits
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 3.0e38, -1e-30])
def test_a_constant_bf16_channel_is_exact(value, bits):
    x = torch.full((300, 4), value).bfloat16().float()
    values, step, store = round_trip(x, "tokens", bits, (1, 1), channels=torch.tensor([1, 2]))
    assert torch.equal(values, store)
    assert not step.any()


@both_bits
def test_magnitudes_beyond_fp16_survive(bits):
    for magnitude in (1e-20, 1e20):
        values, step, store = round_trip(
            magnitude * torch.linspace(-1, 1, 256).view(128, 2), "tokens", bits, (1, 1), channels=torch.tensor([0, 1])
        )
        assert ((values - store).abs() <= 0.51 * step).all()
        assert (step > 0).all()


@both_bits
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_does_not_hide(value, backend, bits, monkeypatch, generator):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", backend)
    x = sample((2 * GROUP, 3), generator)
    x[GROUP + 5, 1] = value
    values, _, _ = round_trip(x, "tokens", bits, (1, 1), channels=torch.arange(3))
    spoiled = torch.zeros(3, 2 * GROUP, dtype=torch.bool)
    spoiled[1, GROUP:] = True
    assert torch.equal(~values.isfinite(), spoiled)


@both_bits
def test_stochastic_rounding_is_unbiased(bits, monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "torch")
    x = torch.rand(400, 8, generator=torch.Generator().manual_seed(3))
    channels, errors = torch.arange(8), []
    for seed in range(24):
        values, step, store = round_trip(x, "tokens", bits, (1, 1), torch.tensor([seed]), channels)
        errors.append(((values - store) / step).mean().double())
    errors = torch.stack(errors)
    assert errors.mean().abs() < 3 * errors.std() / 24**0.5 + 1e-4


def test_the_seed_decides_the_bits(generator):
    x = sample((300, 11), generator)
    first, again, other = (
        quantize_channels(x, CHANNELS, "tokens", 8, seed=torch.tensor([seed]))[0] for seed in (4, 4, 2**40)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_philox_gives_the_published_vectors():
    """Known answers of Random123 (kat_vectors, philox4x32 10): counter and key all zero, and all ones."""
    zero = random16_ref(torch.tensor(0), torch.tensor([0]), 0, 0, 0)[0]
    words = [int(low) | int(high) << 16 for low, high in zero.view(4, 2)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    most = 0xFFFFFFFF
    ones = random16_ref(torch.tensor(-1), torch.tensor([most]), most, most, most)[0]
    words = [int(low) | int(high) << 16 for low, high in ones.view(4, 2)]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@both_bits
@cases
def test_store_keeps_the_bytes_the_formula_says(layout, shape, stride, bits):
    x = torch.ones(shape)
    stored = quantize_channels(x, CHANNELS, layout, bits, stride)
    size = store_channels(x, CHANNELS, layout, stride).shape
    assert sum(t.untyped_storage().nbytes() for t in stored) == quantized_bytes(layout, size, bits)


@pytest.mark.parametrize("layout", ["tokens", "pixels", "planes"])
@pytest.mark.parametrize("K", [0, 1])
def test_none_and_one_channel(layout, K, generator):
    values, step, store = round_trip(sample((2, 5, 4, 6), generator), layout, 8, (1, 1), channels=torch.arange(K))
    assert values.shape == store.shape
    assert ((values - store).abs() <= 0.51 * step + 1e-6).all()


@both_bits
def test_quantised_store_passes_opcheck(bits):
    x = torch.randn(2, 6, 3, 4)
    opcheck(torch.ops.trady.quantize_channels, (x, torch.tensor([0, 2]), "planes", bits, [1, 1], torch.tensor([1])))
    stored = quantize_channels(x, torch.tensor([0, 2]), "pixels", bits)
    opcheck(torch.ops.trady.dequantize_channels, (*stored, "pixels", bits, [2, 24], torch.float32))


def test_unknown_bits_are_named():
    with pytest.raises(ValueError, match="got 3"):
        quantize_channels(torch.ones(4, 4), torch.tensor([0]), "tokens", 3)


def test_the_layout_of_a_single_kernel_is_not_quantised():
    with pytest.raises(ValueError, match="got 'taps', wanted 'tokens'"):
        quantize_channels(torch.ones(IMAGE), torch.tensor([0]), "taps", 8)


def test_groups_do_not_share_their_range():
    x = torch.cat([torch.linspace(0, 1, GROUP), torch.linspace(0, 1000, GROUP)])[:, None]
    values, _, store = round_trip(x, "tokens", 8, (1, 1), channels=torch.tensor([0]))
    assert (values - store)[0, :GROUP].abs().max() < 0.003


@both_bits
@cases
def test_ids_and_scales_at_a_stride_are_read_as_they_are(layout, shape, stride, bits, generator):
    x, ids = sample(shape, generator), torch.arange(9)[::2]
    quantised = quantize_channels(x, ids, layout, bits, stride)
    for found, meant in zip(quantised, quantize_channels(x, ids.contiguous(), layout, bits, stride), strict=True):
        assert torch.equal(found, meant)
    codes, *ranges = quantised
    size = store_channels(x, ids, layout, stride).shape
    apart = [torch.stack([values, torch.full_like(values, 99)], 2)[..., 0] for values in ranges]
    found, meant = (dequantize_channels(codes, *pair, layout, bits, size, torch.float32) for pair in (apart, ranges))
    assert torch.equal(found, meant)
