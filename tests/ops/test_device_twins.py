"""On a device: stores, quantiser, packed activations and updates agree with their torch twins, philox bits included."""

import pytest
import torch

from tests.ops.numerics import relative_error
from trady_triton.ops import conv_wgrad, grouped_wgrad, token_wgrad
from trady_triton.ops.act_pack import act_pack, act_unpack
from trady_triton.ops.act_store import act_store, channel_slots
from trady_triton.ops.dequantize import dequantize_channels
from trady_triton.ops.quantize import quantize_channels
from trady_triton.ops.scatter_update import adamw_hyper, scatter_update_, sgd_hyper
from trady_triton.ops.store import store_channels

pytestmark = pytest.mark.gpu
CHANNELS = torch.tensor([1, 2, 17, 64, 71], dtype=torch.int32)
IMAGE_LAYOUTS = ["pixels", "taps", "planes"]


def on_both(function, *arguments):
    """(kernel on the device, twin on the CPU) of the same arguments."""
    moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRADY_TRITON_BACKEND", "auto")
        ours, twin = function(*moved), function(*arguments)
    as_tuple = (lambda out: out) if isinstance(ours, tuple) else (lambda out: (out,))
    return [t.cpu() for t in as_tuple(ours)], as_tuple(twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_store(layout, memory_format, dtype, generator):
    x = torch.randn(3, 72, 14, 14, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    (ours,), (twin,) = on_both(store_channels, x, CHANNELS, layout)
    assert torch.equal(ours, twin)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("layout", ["pixels", "planes"])
def test_quantised_store_with_the_same_philox_bits(layout, bits, generator):
    x, seed = torch.randn(3, 72, 14, 14, generator=generator), torch.tensor([2**35 + 3])
    ours, twin = on_both(quantize_channels, x, CHANNELS, layout, bits, (1, 1), seed)
    assert torch.equal(ours[1], twin[1])
    assert torch.equal(ours[2], twin[2])
    assert (ours[0] != twin[0]).sum() <= 2  # a fused multiply-add may cross a rounding boundary
    size = store_channels(x, CHANNELS, layout).shape
    (back,), (back_twin,) = on_both(dequantize_channels, *twin, layout, bits, size, torch.float32)
    torch.testing.assert_close(back, back_twin)


@pytest.mark.parametrize(("kind", "bits"), [("relu", 1), ("relu6", 1), ("gelu", 8), ("silu", 8), ("gelu", 2)])
def test_packed_derivative(kind, bits, generator):
    x = torch.randn(3, 17, 33, generator=generator)
    (y, code), (y_twin, code_twin) = on_both(act_pack, x, kind, bits)
    torch.testing.assert_close(y, y_twin)
    assert (code != code_twin).float().mean() < (1e-3 if bits > 1 else 1e-9)
    (dx,), (dx_twin,) = on_both(act_unpack, x, code_twin, kind, bits, y.stride())
    torch.testing.assert_close(dx, dx_twin)


@pytest.mark.parametrize("layout", ["tokens", "taps"])
def test_fused_pass(layout, generator):
    x = torch.randn(5, 40, 72, generator=generator)
    if layout == "taps":
        x = torch.randn(2, 72, 7, 7, generator=generator).contiguous(memory_format=torch.channels_last)
    ours, twin = on_both(act_store, x, CHANNELS, channel_slots(CHANNELS, 72), layout, "relu6", 1)
    for out, ref in zip(ours, twin, strict=True):
        assert torch.equal(out, ref)


@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_update_rounded_stochastically(algorithm, generator):
    def update(w, grad, m, v, seed):
        row = adamw_hyper(0.01, 1) if algorithm == "adamw" else sgd_hyper(0.01, 0.9)
        hyper, channels = torch.tensor([row], dtype=torch.float64), CHANNELS.to(w.device)
        w, m, v = w.clone(), m.clone(), v.clone()
        scatter_update_([w], [grad], [channels], hyper, [m], [v] if algorithm == "adamw" else [], algorithm, seed=seed)
        return w, m, v

    w, grad = torch.randn(96, 72, generator=generator).bfloat16(), torch.randn(5, 96, generator=generator)
    arguments = (w, grad, torch.zeros(5, 96), torch.zeros(5, 96), torch.tensor([77]))
    (w, m, v), (w_twin, m_twin, v_twin) = on_both(update, *arguments)
    assert (w != w_twin).float().mean() < 1e-3
    torch.testing.assert_close(m, m_twin)
    torch.testing.assert_close(v, v_twin)


def shifted(x):
    """The same numbers in memory that starts one element past what 16 bytes divide."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


def weight_gradients(x, dy, channels):
    """Of a 1x1, a 3x3 and a depthwise convolution; dy [N, C, H, W] serves all, also where it is one value an image."""
    x, geometry = shifted(x), ((3, 3), (1, 1), (1, 1), (1, 1))
    tokens, planes = (store_channels(x, channels, layout) for layout in ("pixels", "planes"))
    found = []
    for gradient in (shifted(dy), dy[..., :1, :1].expand_as(dy), dy[:, :, :1].expand_as(dy)):
        found.append(token_wgrad(tokens, gradient, 1))
        found.append(conv_wgrad(planes, gradient, *geometry))
        found.append(grouped_wgrad(planes, gradient, channels, (1, 1), *geometry))
    return tuple(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 72, 7, 7), (5, 72, 1, 1), (2, 72, 1, 9), (3, 72, 5, 7)], ids=str)
@pytest.mark.parametrize("K", [1, 5])
def test_weight_gradients_at_the_edges_of_sizes_and_addresses(K, shape, dtype, generator):
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    channels = CHANNELS[:K] if shape[1] > 1 else torch.zeros(1, dtype=torch.int32)
    for ours, twin in zip(*on_both(weight_gradients, x, dy, channels), strict=True):
        assert relative_error(ours, twin.double()) <= 1e-5


def test_many_channels_by_the_library(generator):
    """More than 256 channels: cuBLAS takes the half-precision operands and returns fp32."""
    for shape, channel_dim in (((300, 40), -1), ((6, 40, 7, 7), 1), ((6, 40, 2, 2), 1)):
        dy = torch.randn(shape, generator=generator).bfloat16()
        store = torch.randn(400, dy.numel() // 40, generator=generator).bfloat16()
        (ours,), (twin,) = on_both(token_wgrad, store, dy, channel_dim)
        assert relative_error(ours, twin.double()) <= 1e-5


@pytest.fixture
def much_memory():
    if torch.cuda.get_device_properties(0).total_memory < 30 << 30:
        pytest.skip("needs 30 GiB")
    yield
    torch.cuda.empty_cache()


def test_offsets_beyond_32_bits(much_memory):
    T, C, channels = (1 << 21) + 5, 1032, torch.tensor([3, 700, 1031], device="cuda")
    x = torch.randn(T, C, device="cuda", dtype=torch.bfloat16)
    picked = x[:, channels].contiguous()
    store = store_channels(x, channels, "tokens")
    assert torch.equal(store, picked.t())
    everything = torch.arange(3, device="cuda")
    for ours, few in zip(
        quantize_channels(x, channels, "tokens", 8), quantize_channels(picked, everything, "tokens", 8), strict=True
    ):
        assert torch.equal(ours, few)
    assert relative_error(token_wgrad(store, x), torch.mm(store, x, torch.float32).double()) <= 1e-3
    y, code = act_pack(x, "relu", 1)
    assert torch.equal(y, x.relu())
    del y
    assert torch.equal(act_unpack(x, code, "relu", 1, x.stride()), x.relu())
