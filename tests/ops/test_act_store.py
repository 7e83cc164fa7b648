"""The fused pass gives what packing and storing one after the other give."""

import pytest
import torch
from torch.library import opcheck

from tests.ops.numerics import GuardedArena
from trady_triton.ops.act_pack import act_pack
from trady_triton.ops.act_store import act_store, channel_slots, fusable
from trady_triton.ops.activation import bounds
from trady_triton.ops.store import store_channels

KINDS = [("relu6", 1), ("hardsigmoid", 1), ("gelu", 8), ("hardswish", 8), ("silu", 2)]
CHANNELS = torch.tensor([1, 2, 17, 64, 71])


def token_input(generator, dtype=torch.float32):
    return torch.randn(3, 23, 72, generator=generator).to(dtype)


def image_input(generator, dtype=torch.float32):
    x = torch.randn(2, 72, 5, 3, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def assert_equals_two_passes(x, layout, kind, bits, seed=None):
    slots = channel_slots(CHANNELS, 72)
    with GuardedArena() as arena:
        y, code, store = act_store(arena.place(x), CHANNELS, slots, layout, kind, bits, seed=seed)
    y_two, code_two = act_pack(x, kind, bits, seed=seed)
    store_two = store_channels(y_two, CHANNELS, layout)
    for out, two in ((y, y_two), (code, code_two), (store, store_two)):
        assert torch.equal(out, two)
        assert out.stride() == two.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_tokens(kind, bits, dtype, generator):
    x = token_input(generator, dtype)
    assert fusable(x, "tokens")
    assert_equals_two_passes(x, "tokens", kind, bits)


@pytest.mark.parametrize("layout", ["pixels", "taps"])
@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_channels_last_images(kind, bits, layout, generator):
    x = image_input(generator)
    assert fusable(x, layout)
    assert_equals_two_passes(x, layout, kind, bits)


@pytest.mark.parametrize("layout", ["pixels", "taps", "planes"])
def test_other_layouts_take_two_passes(layout, generator):
    x = image_input(generator).contiguous()
    assert not fusable(x, layout)
    assert_equals_two_passes(x, layout, "gelu", 8)


def test_stochastic_codes_are_those_of_the_separate_op(generator):
    assert_equals_two_passes(token_input(generator), "tokens", "gelu", 8, torch.tensor([9]))


@pytest.mark.parametrize("layout", ["tokens", "taps"])
def test_twin_agrees(layout, generator, monkeypatch):
    x = token_input(generator) if layout == "tokens" else image_input(generator)
    slots = channel_slots(CHANNELS, 72)
    ours = act_store(x, CHANNELS, slots, layout, "relu6", 1)
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "torch")
    for out, twin in zip(ours, act_store(x, CHANNELS, slots, layout, "relu6", 1), strict=True):
        assert torch.equal(out, twin)


@pytest.mark.parametrize("layout", ["tokens", "taps"])
def test_no_channel_selected(layout, generator):
    x = token_input(generator) if layout == "tokens" else image_input(generator)
    none = torch.arange(0)
    y, _, store = act_store(x, none, channel_slots(none, 72), layout, "relu", 1)
    assert torch.equal(y, x.relu())
    assert store.numel() == 0


def test_fused_op_passes_opcheck():
    x, (low, high) = torch.randn(4, 16), bounds("gelu", None, None)
    channels = torch.tensor([1, 3])
    arguments = (x, channels, channel_slots(channels, 16), "tokens", "gelu", 8, low, high, None)
    opcheck(torch.ops.trady.act_store, arguments)


def test_slots_of_another_layer_are_refused():
    with pytest.raises(ValueError, match="slots"):
        act_store(torch.ones(3, 16), CHANNELS, channel_slots(CHANNELS, 72), "tokens", "relu", 1)
