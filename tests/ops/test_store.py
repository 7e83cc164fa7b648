"""The compact store holds exactly the selected channels, in the layout that the weight gradients read."""

import pytest
import torch
from torch.library import opcheck

from tests.ops.numerics import GuardedArena
from trady_triton.ops.store import store_bytes, store_channels, store_channels_ref

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def expected(x, channels, layout, stride):
    """An independent loop over the selected channels, as [K, T]."""
    if layout == "tokens":
        return torch.stack([x[..., c].flatten() for c in channels.tolist()])
    return torch.stack([x[:, c, :: stride[0], :: stride[1]].flatten() for c in channels.tolist()])


def as_rows(store, layout, K):
    """Any store as [K, T]."""
    if layout == "taps":
        return store[..., :K].flatten(0, 2).t()
    return store.flatten(1)


def image(shape, memory, dtype, generator):
    x = torch.randn(shape, generator=generator).to(dtype)
    if memory == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return torch.cat([x, x], dim=3)[..., : shape[3]] if memory == "slice" else x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize(
    ("layout", "stride"), [("pixels", (1, 1)), ("pixels", (2, 3)), ("taps", (1, 1)), ("planes", (1, 1))]
)
def test_store_of_an_image_is_the_selected_channels(layout, stride, memory, dtype, generator):
    channels = torch.tensor([0, 3, 4, 9, 17], dtype=torch.int32)
    with GuardedArena() as arena:
        x = arena.place(image((2, 18, 7, 9), memory, dtype, generator))
        store = store_channels(x, channels, layout, stride)
    assert torch.equal(as_rows(store, layout, 5), expected(x, channels, layout, stride))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(1,), (131,), (3, 50), (2, 3, 5, 7)])
def test_store_of_tokens_is_the_selected_features(leading, dtype, generator):
    channels = torch.arange(1, 40, 2)
    with GuardedArena() as arena:
        x = arena.place(torch.randn(*leading, 41, generator=generator).to(dtype))
        store = store_channels(x, channels, "tokens")
    assert torch.equal(store, expected(x, channels, "tokens", None))


@pytest.mark.parametrize("layout", ["pixels", "taps", "planes"])
def test_ids_at_a_stride_are_read_as_they_are(layout, generator):
    x, ids = torch.randn(2, 9, 4, 5, generator=generator), torch.arange(9)[::2]
    assert torch.equal(store_channels(x, ids, layout), store_channels(x, ids.contiguous(), layout))


def test_transposed_tokens_are_stored_in_index_order(generator):
    x = torch.randn(6, 4, 8, generator=generator).transpose(0, 1)
    channels = torch.tensor([7, 2])
    assert torch.equal(store_channels(x, channels, "tokens"), expected(x, channels, "tokens", None))


def test_pixel_major_padding_is_zero(generator):
    x = torch.randn(2, 5, 3, 3, generator=generator)
    with GuardedArena() as arena:
        store = store_channels(arena.place(x), torch.tensor([4, 0, 2]), "taps")
    assert store.shape == (2, 3, 3, 8)
    assert not store[..., 3:].any()


@pytest.mark.parametrize("K", [0, 1, 6])
@pytest.mark.parametrize("layout", ["tokens", "pixels", "taps", "planes"])
def test_torch_twin_agrees_in_values_and_strides(layout, K, generator):
    x = torch.randn(2, 6, 5, 6, generator=generator)
    channels = torch.randperm(6, generator=generator)[:K]
    store, twin = store_channels(x, channels, layout), store_channels_ref(x, channels, layout)
    assert torch.equal(store, twin)
    assert store.shape == twin.shape
    assert store.stride() == twin.stride()


@pytest.mark.parametrize("layout", ["tokens", "pixels", "taps", "planes"])
def test_store_keeps_the_bytes_the_formula_says(layout):
    store = store_channels(torch.ones(2, 6, 4, 6, dtype=torch.float16), torch.tensor([1, 2, 5]), layout)
    assert store.untyped_storage().nbytes() == store_bytes(layout, 3, 48, 2)


@pytest.mark.parametrize("layout", ["tokens", "taps"])
def test_store_passes_opcheck(layout):
    opcheck(torch.ops.trady.store_channels, (torch.randn(2, 6, 3, 4), torch.tensor([0, 2]), layout, [1, 1]))


@pytest.mark.parametrize(
    ("shape", "layout", "stride"), [((2, 3, 4, 4), "CM", (1, 1)), ((4, 3), "taps", (1, 1)), ((4, 3), "tokens", (2, 2))]
)
def test_wrong_arguments_are_named(shape, layout, stride):
    with pytest.raises(ValueError, match=r"layout|dimensions|stride"):
        store_channels(torch.ones(shape), torch.tensor([0]), layout, stride)
