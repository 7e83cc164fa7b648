"""Modules whose policy allows rounding: same forward bits, the bytes that are promised, and bounded errors."""

from __future__ import annotations

import copy
import pickle
from math import ceil

import pytest
import timm.layers
import torch
from kept import forward_backward, kept_bytes, lean_twin
from timm.layers.cbam import ChannelAttn, SpatialAttn
from timm.layers.grn import GlobalResponseNorm
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.metaformer import StarReLU
from timm.models.senet import SEModule as LegacySEModule
from torch import nn
from torchvision.ops.misc import SqueezeExcitation

import trady_triton.models  # noqa: F401  teaches timm's types
from trady_triton.meters import FlopsByKind
from trady_triton.slot import ChannelSlot

X = (3, 8, 9, 7)
COUNT = 3 * 8 * 9 * 7
SMOOTH = {
    "silu": (nn.SiLU(), 211, 0.31),
    "silu-inplace": (nn.SiLU(inplace=True), 211, 0.31),
    "gelu": (nn.GELU(), 201, 0.36),
    "gelu-tanh": (nn.GELU(approximate="tanh"), 201, 0.36),
    "timm-gelu": (timm.layers.GELU(), 201, 0.36),
    "timm-gelu-tanh": (timm.layers.GELUTanh(), 201, 0.36),
    "hardswish": (nn.Hardswish(), 127, 0.51),
    "hardswish-inplace": (nn.Hardswish(inplace=True), 127, 0.51),
}
NORMS = {
    "layer-norm": (nn.LayerNorm(7), 3 * 8 * 9),
    "layer-norm-2": (nn.LayerNorm((9, 7), elementwise_affine=False), 3 * 8),
    "timm-layer-norm": (timm.layers.LayerNorm(7), 3 * 8 * 9),
    "layer-norm-2d": (timm.layers.LayerNorm2d(8), 3 * 9 * 7),
}
PACKED = {  # those that keep their input, with the rows of its code
    "group-norm": (nn.GroupNorm(4, 8), 3 * 8),
    "group-norm-plain": (nn.GroupNorm(2, 8, affine=False), 3 * 8),
    "timm-group-norm": (timm.layers.GroupNorm(8, 2), 3 * 8),
    "timm-group-norm-1": (timm.layers.GroupNorm1(8), 3 * 8),
    "rms-norm": (nn.RMSNorm(7), 3 * 8 * 9),
    "rms-norm-2": (nn.RMSNorm((9, 7), elementwise_affine=False), 3 * 8),
    "timm-rms-norm": (timm.layers.RmsNorm(7), 3 * 8 * 9),
    "timm-rms-norm-2d": (timm.layers.RmsNorm2d(8), 3 * 8),
    "timm-simple-norm": (timm.layers.SimpleNorm(7), 3 * 8 * 9),
    "group-norm-act": (timm.layers.GroupNormAct(8, 2, act_layer=nn.SiLU), 3 * 8),
    "filter-response-norm": (timm.layers.FilterResponseNormAct2d(8, act_layer=nn.SiLU), 3 * 8),
    "evo-norm": (timm.layers.EvoNorm2dS0(8, group_size=4), 3 * 8),
    "mish": (nn.Mish(), 3 * 8),
    "star-relu": (StarReLU(), 3 * 8),
    "quick-gelu": (timm.layers.QuickGELU(), 3 * 8),
    "response-norm": (GlobalResponseNorm(7), 3 * 7),
    "response-norm-2d": (GlobalResponseNorm(8, channels_last=False), 3 * 8),
}
GATES = {
    "squeeze-excite": SqueezeExcite(8, rd_ratio=0.5),
    "se-module": timm.layers.SEModule(8, rd_channels=4),
    "effective-se": timm.layers.EffectiveSEModule(8),
    "legacy-se": LegacySEModule(8, 2),
    "torchvision-se": SqueezeExcitation(8, 4),
    "eca": timm.layers.EcaModule(8),
    "gather-excite": timm.layers.GatherExcite(8, use_mlp=False),
    "global-context": timm.layers.GlobalContext(8),
    "channel-attention": ChannelAttn(8, rd_ratio=0.5),
    "spatial-attention": SpatialAttn(),
}
each_smooth = pytest.mark.parametrize(("module", "scale", "gap"), SMOOTH.values(), ids=SMOOTH.keys())
each_norm = pytest.mark.parametrize(("module", "rows"), NORMS.values(), ids=NORMS.keys())
each_packed = pytest.mark.parametrize(("module", "rows"), PACKED.values(), ids=PACKED.keys())
each_gate = pytest.mark.parametrize("module", GATES.values(), ids=GATES.keys())
each_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def ready(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    module = copy.deepcopy(module).to(dtype).eval()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def sample(dtype: torch.dtype = torch.float64, **options: torch.memory_format) -> torch.Tensor:
    torch.manual_seed(0)
    return (2 * torch.randn(X, dtype=dtype)).to(**options)


@each_smooth
@each_layout
@pytest.mark.parametrize("bits", [8, 2])
def test_packed_derivative_errs_by_half_a_step(module, scale, gap, layout, bits):
    plain, x = ready(module), sample(memory_format=layout)
    dy = torch.randn(X, dtype=torch.float64)
    y, dx = forward_backward(plain, x, dy)
    lean_y, lean_dx = forward_backward(lean_twin(plain, activations=bits), x, dy)
    assert torch.equal(lean_y, y)
    bound = 0.5 / scale if bits == 8 else gap
    assert ((lean_dx - dx).abs() <= (bound + 1e-9) * dy.abs()).all()


@each_smooth
def test_dead_and_saturated_elements_stay_exact_in_eight_bits(module, scale, gap):
    x = torch.tensor([-40.0, 40.0, -60.0, 60.0], dtype=torch.float64)
    _, dx = forward_backward(module, x)
    torch.testing.assert_close(forward_backward(lean_twin(module, activations=8), x)[1], dx, rtol=0, atol=1e-12)


@each_smooth
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "promised"), [(8, COUNT), (2, 2 * ceil(COUNT / 8))])
def test_smooth_activation_keeps_its_bits_alone(module, scale, gap, dtype, bits, promised):
    lean, start = lean_twin(module, activations=bits), sample(dtype).requires_grad_() * 1
    assert kept_bytes(lambda: lean(start), lean)[1] == promised


@each_smooth
def test_smooth_activation_of_an_odd_shape(module, scale, gap):
    for shape in ((), (1,), (5, 3)):
        x = torch.randn(shape, dtype=torch.float64)
        for bits in (8, 2):
            assert forward_backward(lean_twin(module, activations=bits), x)[1].shape == shape


@each_norm
@each_layout
def test_packed_layer_norm_errs_little(module, rows, layout):
    plain, x = ready(module), sample(memory_format=layout)
    dy = torch.randn(X, dtype=torch.float64)
    y, dx = forward_backward(plain, x, dy)
    lean_y, lean_dx = forward_backward(lean_twin(plain, activations=8), x, dy)
    assert torch.equal(lean_y, y)
    assert (lean_dx - dx).norm() <= 0.01 * dx.norm()


@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layer_norm_keeps_a_byte_an_element_and_eight_a_row(module, rows, dtype):
    lean, start = lean_twin(ready(module, dtype), activations=8), sample(dtype).requires_grad_() * 1
    assert kept_bytes(lambda: lean(start), lean)[1] == COUNT + 8 * rows


@pytest.mark.parametrize("module", [nn.LayerNorm(7), timm.layers.LayerNorm(7), timm.layers.LayerNorm2d(8)])
def test_layer_norm_with_a_trained_affine_is_exact(module):
    plain, x = ready(module), sample()
    lean = lean_twin(plain, activations=8).requires_grad_(True)
    _, dx = forward_backward(plain, x)
    assert torch.equal(forward_backward(lean, x)[1], dx)
    assert torch.equal(lean.weight.grad, plain.weight.grad)


@each_packed
@each_layout
def test_packed_input_errs_little(module, rows, layout):
    plain, x = ready(module), sample(memory_format=layout)
    dy = torch.randn(X, dtype=torch.float64)
    y, dx = forward_backward(plain, x, dy)
    lean_y, lean_dx = forward_backward(lean_twin(plain, activations=8), x, dy)
    assert torch.equal(lean_y, y)
    assert 0 < (lean_dx - dx).norm() <= 0.01 * dx.norm()


@each_packed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_input_is_a_byte_an_element_and_eight_a_row(module, rows, dtype):
    plain, start = ready(module, dtype).requires_grad_(False), sample(dtype).requires_grad_() * 1
    lean = lean_twin(plain, activations=8)
    packed = COUNT + 8 * rows
    promised = packed if packed < COUNT * dtype.itemsize else kept_bytes(lambda: plain(start), plain)[1]
    assert kept_bytes(lambda: lean(start), lean)[1] == promised


@pytest.mark.parametrize("module", [nn.GroupNorm(4, 8), nn.RMSNorm(7), GlobalResponseNorm(7)])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_a_trained_affine_of_packed_input_has_its_gradients(module, needs_dx):
    plain, x = ready(module), sample().requires_grad_(needs_dx)
    lean = lean_twin(plain, activations=8).requires_grad_(True)
    dy = torch.randn(X, dtype=torch.float64)
    lean(x).backward(dy)
    plain(x).backward(dy)
    for ours, theirs in zip(lean.parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 0.01 * theirs.grad.norm()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, timm.layers.BatchNormAct2d])
@pytest.mark.parametrize(("activations", "promised", "error"), [("exact", 4 * COUNT, 1e-6), (8, COUNT + 8 * 24, 0.01)])
def test_a_trained_batchnorm_keeps_its_input_as_the_policy_says(kind, activations, promised, error):
    plain = ready(kind(8), torch.float32)
    nn.init.uniform_(plain.running_var, 0.5, 2.0)
    if kind is timm.layers.BatchNormAct2d:
        plain.act = nn.Identity()
    lean = lean_twin(plain, batch_norm="affine", activations=activations).requires_grad_(True).train()
    start, dy = sample(torch.float32).requires_grad_() * 1, torch.randn(X)
    y, kept = kept_bytes(lambda: lean(start), lean)
    expected = plain(start.detach())
    assert torch.equal(y, expected)
    assert kept == promised
    y.backward(dy)
    expected.backward(dy)
    for ours, theirs in zip(lean.parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= error * theirs.grad.norm()
    assert lean.num_batches_tracked == 0


@pytest.mark.parametrize("gate_last", [False, True])
def test_a_gated_mlp_keeps_a_byte_of_what_its_halves_are_made_of(gate_last):
    module = timm.layers.GluMlp(7, 16, act_layer=nn.SiLU, gate_last=gate_last)
    plain, x = ready(module), sample()
    y, dx = forward_backward(plain, x)
    lean_y, lean_dx = forward_backward(lean_twin(plain, activations=8), x)
    assert torch.equal(lean_y, y)
    assert 0 < (lean_dx - dx).norm() <= 0.01 * dx.norm()
    lean, start = lean_twin(ready(module, torch.float32), activations=8), sample(torch.float32).requires_grad_() * 1
    assert kept_bytes(lambda: lean(start), lean)[1] == 3 * 8 * 9 * (16 + 8)


def test_layer_scale_keeps_nothing_as_it_is():
    module, start = timm.layers.LayerScale(7).requires_grad_(False), sample().requires_grad_() * 1
    assert kept_bytes(lambda: module(start), module)[1] == 0


@each_gate
@each_layout
def test_packed_gate_errs_little(module, layout):
    plain, x = ready(module), sample(memory_format=layout)
    dy = torch.randn(X, dtype=torch.float64)
    y, dx = forward_backward(plain, x, dy)
    lean_y, lean_dx = forward_backward(lean_twin(plain, activations=8), x, dy)
    assert torch.equal(lean_y, y)
    assert (lean_dx - dx).norm() <= 0.01 * dx.norm()


@each_gate
def test_packed_gate_keeps_a_byte_an_element(module):
    start = sample(torch.float32).requires_grad_() * 1
    lean = lean_twin(ready(module, torch.float32), activations=8)
    assert kept_bytes(lambda: lean(start), lean)[1] == COUNT + 8 * 3 * 8


def test_channels_drawn_within_a_packed_gate_have_their_gradients():
    plain, dy = ready(SqueezeExcite(8, rd_ratio=0.5)), torch.randn(X, dtype=torch.float64)
    lean = lean_twin(plain, activations=8)
    slot = lean.conv_reduce.slot = ChannelSlot("conv_reduce", lean.conv_reduce.weight, 1, "")
    slot.set(range(0, 8, 2))
    for x in (sample(), sample().requires_grad_()):
        slot.proxy.grad = plain.conv_reduce.weight.grad = None
        lean(x).backward(dy)
        plain(x).backward(dy)
        dense = plain.conv_reduce.weight.grad.transpose(0, 1)[::2]
        assert 0 < (slot.proxy.grad - dense).norm() <= 0.03 * dense.norm()


def test_flops_are_counted_through_a_packed_gate():
    net = nn.Sequential(nn.Conv2d(8, 8, 1), SqueezeExcitation(8, 4)).requires_grad_(False)
    lean, x = lean_twin(net, activations=8), sample(torch.float32).requires_grad_()
    with FlopsByKind(lean) as flops:
        lean(x).sum().backward()
    assert flops.dgrad_flops > 0


def test_a_packed_gate_with_drawn_channels_waits_for_its_backward():
    lean = lean_twin(ready(SqueezeExcite(8, rd_ratio=0.5)), activations=8)
    slot = lean.conv_reduce.slot = ChannelSlot("conv_reduce", lean.conv_reduce.weight, 1, "")
    slot.set([0, 2])
    y = lean(sample()).sum()
    assert slot.is_waiting
    y.backward()
    assert not slot.is_waiting
    y = lean(sample()).sum()
    slot.set([1])
    with pytest.raises(RuntimeError, match="before the last resample"):
        y.backward()


def test_sums_over_parts_are_wide_where_the_dtype_is_narrow():
    module = nn.GroupNorm(2, 8).bfloat16()
    start, dy = torch.randn(16, 8, 9, 7).bfloat16(), torch.ones(16, 8, 9, 7, dtype=torch.bfloat16)
    lean, reference = lean_twin(module, activations=8).requires_grad_(), copy.deepcopy(module).float().requires_grad_()
    lean(start).backward(dy)
    reference(start.float()).backward(dy.float())
    assert torch.equal(lean.bias.grad, reference.bias.grad.bfloat16())


def test_what_is_random_or_writes_to_its_input_is_not_run_twice():
    module, x = timm.layers.GroupNormAct(8, 2, drop_layer=nn.Dropout).eval(), sample(torch.float32)
    lean = lean_twin(module, activations=8)
    start = x.requires_grad_() * 1
    assert kept_bytes(lambda: lean(start), lean)[1] == COUNT + 8 * 3 * 8
    lean.train()
    assert kept_bytes(lambda: lean(start), lean)[1] > 4 * COUNT
    assert lean_twin(nn.Mish(inplace=True), activations=8)(start) is start


def test_rows_too_short_to_gain_are_kept_as_they_are():
    start = torch.randn(3, 8, 1, 1).requires_grad_() * 1
    lean = lean_twin(nn.Sigmoid(), activations=8)
    assert kept_bytes(lambda: lean(start), lean)[1] == 4 * 3 * 8


@pytest.mark.parametrize("module", [nn.GroupNorm(4, 8), GlobalResponseNorm(7), timm.layers.StdConv2d(8, 8, 1)])
def test_made_classes_copy_and_pickle(module):
    lean = lean_twin(ready(module), activations=8)
    for twin in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        assert type(twin) is type(lean)
        assert torch.equal(twin(sample()), lean(sample()))


@pytest.mark.parametrize(
    "module",
    [
        *(m for m, *_ in SMOOTH.values()),
        *(m for m, _ in (*NORMS.values(), *PACKED.values())),
        *GATES.values(),
    ],
)
def test_the_default_policy_is_exact(module):
    plain, x = ready(module), sample()
    dy = torch.randn(X, dtype=torch.float64)
    y, dx = forward_backward(plain, x, dy)
    lean_y, lean_dx = forward_backward(lean_twin(plain), x, dy)
    assert torch.equal(lean_y, y)
    torch.testing.assert_close(lean_dx, dx, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("module", [nn.GELU(), nn.LayerNorm(7), SqueezeExcite(8)])
def test_packs_nothing_where_no_graph_is_built(module):
    lean = lean_twin(ready(module), activations=8)
    with torch.no_grad():
        y, kept = kept_bytes(lambda: lean(sample().requires_grad_()), lean)
    assert (kept, y.requires_grad) == (0, False)


@pytest.mark.parametrize(
    "module", [nn.GELU(), nn.LayerNorm(7), nn.GroupNorm(4, 8), GlobalResponseNorm(7), timm.layers.RmsNorm(7)]
)
def test_packed_modules_work_under_autocast(module):
    lean, plain = lean_twin(module, activations=8), module
    x, dy = sample(torch.bfloat16), torch.randn(X, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        (lean_y, lean_dx), (y, dx) = forward_backward(lean, x, dy), forward_backward(plain, x, dy)
    assert torch.equal(lean_y, y)
    assert lean_dx.dtype == dx.dtype
    assert (lean_dx - dx).float().norm() <= 0.02 * dx.float().norm()
