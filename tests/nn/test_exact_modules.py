"""Every exact lean module against the plain one: same forward bits, same gradient, and the bytes that it promises."""

from __future__ import annotations

import copy
from math import ceil

import pytest
import timm.layers
import torch
from kept import forward_backward, kept_bytes, lean_twin
from torch import nn

import trady_triton.models  # noqa: F401  teaches timm's types

X = (2, 8, 13, 11)  # an odd plane: nothing divides by eight by luck but the channels
BIT = ceil(2 * 8 * 13 * 11 / 8)
HALF = 2 * 8 * 7 * 6  # outputs of a pool of stride 2

MODULES = {
    "relu": (nn.ReLU(), BIT),
    "relu-inplace": (nn.ReLU(inplace=True), BIT),
    "relu6": (nn.ReLU6(), BIT),
    "relu6-inplace": (nn.ReLU6(inplace=True), BIT),
    "hardtanh": (nn.Hardtanh(-0.5, 0.25), BIT),
    "leaky-relu": (nn.LeakyReLU(0.1, inplace=True), BIT),
    "hardsigmoid": (nn.Hardsigmoid(), BIT),
    "batchnorm": (nn.BatchNorm2d(8), 0),
    "batchnorm-plain": (nn.BatchNorm2d(8, affine=False), 0),
    "batchnorm-sync": (nn.SyncBatchNorm(8), 0),
    "batchnorm-act": (timm.layers.BatchNormAct2d(8, act_layer=nn.ReLU6), BIT),
    "batchnorm-no-act": (timm.layers.BatchNormAct2d(8, apply_act=False), 0),
    "maxpool": (nn.MaxPool2d(3, 2, 1), HALF),
    "maxpool-dilated": (nn.MaxPool2d((2, 3), 1, (0, 1), dilation=(2, 1)), 2 * 8 * 11 * 11),
    "maxpool-ceil": (nn.MaxPool2d(2, ceil_mode=True), HALF),
    "avgpool": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), 0),
    "avgpool-ceil": (nn.AvgPool2d(2, ceil_mode=True), 0),
    "avgpool-same": (timm.layers.AvgPool2dSame(3, 2), 0),
    "dropout": (nn.Dropout(0.5), 0),
    "std-conv": (timm.layers.StdConv2d(8, 4, 3, stride=2, padding=1), 0),
    "scaled-std-conv": (timm.layers.ScaledStdConv2dSame(8, 4, 3, stride=2, groups=2), 0),
    "transposed-conv": (nn.ConvTranspose2d(8, 4, 3, stride=2), 0),
    "blur-pool": (timm.layers.BlurPool2d(8), 0),
}
each_module = pytest.mark.parametrize(("module", "promised"), MODULES.values(), ids=MODULES.keys())


def ready(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy in eval mode whose statistics and affine are not those of an untrained layer."""
    torch.manual_seed(1)
    module = copy.deepcopy(module).to(dtype).eval()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, *((0.5, 2.0) if name in ("running_var", "weight") else (-1.0, 1.0)))
    return module


def sample(dtype: torch.dtype = torch.float64, **options: torch.memory_format) -> torch.Tensor:
    torch.manual_seed(0)
    return (3 * torch.randn(X, dtype=dtype)).to(**options)


@each_module
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_forward_is_bitwise_and_gradient_equals_plain(module, promised, layout):
    plain, x = ready(module), sample(memory_format=layout)
    y, dx = forward_backward(plain, x)
    lean_y, lean_dx = forward_backward(lean_twin(plain), x)
    assert torch.equal(lean_y, y)
    assert lean_y.stride() == y.stride()
    torch.testing.assert_close(lean_dx, dx, rtol=1e-10, atol=1e-12)


@each_module
def test_gradient_takes_any_layout_of_dy(module, promised):
    plain, x = ready(module), sample(memory_format=torch.channels_last)
    shape = plain(x).shape
    for dy in (torch.randn(shape, dtype=x.dtype), torch.randn(1, dtype=x.dtype).expand(shape)):
        torch.testing.assert_close(forward_backward(lean_twin(plain), x, dy)[1], forward_backward(plain, x, dy)[1])


@each_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_what_it_promises_to_the_byte(module, promised, dtype):
    lean, x = lean_twin(ready(module, dtype)), sample(dtype).requires_grad_()
    start = x * 1
    assert kept_bytes(lambda: lean(start), lean)[1] == promised


@each_module
def test_keeps_nothing_where_no_graph_is_built(module, promised):
    lean = lean_twin(ready(module))
    y, kept = kept_bytes(lambda: lean(sample()), lean)
    assert (kept, y.requires_grad) == (0, False)
    with torch.no_grad():
        y, kept = kept_bytes(lambda: lean(sample().requires_grad_() * 1), lean)
    assert (kept, y.requires_grad) == (0, False)


@each_module
def test_copies_and_state_stay_those_of_the_plain_module(module, promised):
    plain = ready(module)
    lean = lean_twin(plain)
    assert list(lean.state_dict()) == list(plain.state_dict())
    assert torch.equal(copy.deepcopy(lean)(sample()), plain(sample()))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, timm.layers.BatchNormAct2d])
def test_batchnorm_in_train_mode_is_the_plain_one_if_the_policy_says_so(kind):
    plain = ready(kind(8)).train()
    lean, x = lean_twin(plain, batch_norm="train"), sample()
    torch.testing.assert_close(forward_backward(lean, x)[1], forward_backward(plain, x)[1], rtol=1e-10, atol=1e-12)
    assert torch.equal(lean.running_mean, plain.running_mean)
    assert torch.equal(lean.running_var, plain.running_var)
    assert lean.num_batches_tracked == plain.num_batches_tracked


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
                                  timm.layers.BatchNormAct2d])  # fmt: skip
def test_batchnorm_in_train_mode_keeps_its_statistics_by_default(kind):
    sizes = {nn.BatchNorm1d: (2, 8, 143), nn.BatchNorm3d: (2, 8, 13, 11, 1)}
    plain, x = ready(kind(8)), sample().view(sizes.get(kind, X))
    lean = lean_twin(plain).train()
    assert torch.equal(forward_backward(lean, x)[0], plain(x))
    assert torch.equal(lean.running_mean, plain.running_mean)
    assert lean.num_batches_tracked == 0


def test_batchnorm_with_a_trained_affine_has_its_gradients():
    plain = ready(nn.BatchNorm2d(8))
    lean = lean_twin(plain).requires_grad_(True)
    forward_backward(lean, sample())
    forward_backward(plain, sample())
    assert torch.equal(lean.weight.grad, plain.weight.grad)
    assert torch.equal(lean.bias.grad, plain.bias.grad)


def test_batchnorm_under_autocast_gives_the_plain_bits():
    plain, x = ready(nn.BatchNorm2d(8), torch.float32), sample(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, dx = forward_backward(plain, x)
        lean_y, lean_dx = forward_backward(lean_twin(plain), x)
    assert lean_y.dtype == y.dtype
    assert torch.equal(lean_y, y)
    assert torch.equal(lean_dx, dx)


@pytest.mark.parametrize(
    "module", [nn.ReLU(True), nn.ReLU6(True), nn.Hardtanh(inplace=True), nn.LeakyReLU(inplace=True)]
)
def test_in_place_stays_in_place(module):
    start = sample().requires_grad_() * 1
    assert lean_twin(module)(start) is start


@pytest.mark.parametrize("value", [0.0, 6.0, float("inf"), float("-inf")])
def test_edges_of_the_slopes_are_those_of_torch(value):
    x = torch.full((9,), value, dtype=torch.float64)
    for module in (nn.ReLU(), nn.ReLU6(), nn.LeakyReLU()):
        y, dx = forward_backward(module, x)
        lean_y, lean_dx = forward_backward(lean_twin(module), x)
        torch.testing.assert_close(lean_y, y, rtol=0, atol=0)
        torch.testing.assert_close(lean_dx, dx, rtol=0, atol=0)


def test_blocked_elements_get_zero_even_of_an_infinite_gradient():
    x = torch.tensor([-1.0, 1.0])
    assert forward_backward(lean_twin(nn.ReLU()), x, torch.tensor([float("inf"), 2.0]))[1].tolist() == [0.0, 2.0]


def test_ties_of_the_maximum_go_where_torch_sends_them():
    x = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    pool = nn.MaxPool2d(3, 2, 1)
    assert torch.equal(forward_backward(lean_twin(pool), x)[1], forward_backward(pool, x)[1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_draws_as_torch_does_and_keeps_a_bit(layout):
    plain, x = nn.Dropout(0.3).train(), sample(memory_format=layout)
    lean = lean_twin(plain)
    results = []
    for module in (lean, plain):
        torch.manual_seed(5)
        results.append(forward_backward(module, x))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-10, atol=1e-12)
    start = sample().requires_grad_() * 1
    assert kept_bytes(lambda: lean(start), lean)[1] == BIT


def test_lean_modules_are_called_as_the_plain_ones_are():
    x, conv, norm = sample(), ready(nn.ConvTranspose2d(8, 4, 3, stride=2)), ready(nn.GroupNorm(2, 8))
    assert torch.equal(lean_twin(conv)(x, output_size=(28, 24)), conv(x, output_size=(28, 24)))
    for module in (conv, norm, nn.Sequential(norm)):
        assert torch.equal(lean_twin(module)(input=x), module(input=x))
