"""The lean autograd Functions against dense autograd in float64."""

import gc
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trady_triton.functional import (
    ConvGeometry,
    _conv_dgrad,
    _LeanConv2d,
    _LeanLinear,
    _transposed_dgrad,
    lean_conv2d,
    lean_linear,
)
from trady_triton.slot import ChannelSlot

# in, out, kernel, stride, padding, dilation, groups, height, width
CONVOLUTIONS = {
    "plain": (5, 4, 3, 1, 1, 1, 1, 6, 7),
    "pointwise": (5, 4, 1, 1, 0, 1, 1, 5, 5),
    "strided pointwise": (5, 4, 1, 2, 0, 1, 1, 7, 6),
    "padded strided pointwise": (5, 4, 1, 2, 1, 1, 1, 5, 6),
    "strided, dilated": (3, 4, 3, 2, 2, 2, 1, 9, 8),
    "stride over kernel": (3, 4, 2, 3, 0, 1, 1, 8, 8),
    "padding over kernel": (3, 2, 2, 1, 3, 1, 1, 4, 4),
    "depthwise": (6, 6, 3, 2, 1, 1, 6, 7, 7),
    "depthwise multiplier": (4, 12, 3, 1, 1, 1, 4, 5, 5),
    "grouped": (6, 9, 3, 1, 1, 2, 3, 7, 7),
}


def conv_case(name: str, channels: list[int] | None = None):
    cin, cout, kernel, stride, padding, dilation, groups, height, width = CONVOLUTIONS[name]
    torch.manual_seed(0)
    x = torch.randn(2, cin, height, width, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(cout, cin // groups, kernel, kernel, dtype=torch.float64), requires_grad=False)
    bias = torch.randn(cout, dtype=torch.float64)
    slot = ChannelSlot("conv", weight, groups, "plan")
    slot.set(range(0, cin, 2) if channels is None else channels)
    return x, weight, bias, slot, ConvGeometry((stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)


def dense_conv(x, weight, bias, geometry):
    return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def channel_rows(grad, groups):
    """dW [O, C/G, R, S] -> [C, O/G, R, S], by explicit slicing."""
    out, group_size = grad.shape[0] // groups, grad.shape[1]
    return torch.stack([grad[c // group_size * out :][:out, c % group_size] for c in range(groups * group_size)])


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_both_ways_to_dx_agree(name):
    x, weight, bias, _, geometry = conv_case(name)
    dy = torch.randn_like(dense_conv(x, weight, bias, geometry))
    expected = _conv_dgrad(dy, weight, x.shape, geometry)
    torch.testing.assert_close(_transposed_dgrad(dy, weight, x.shape, geometry), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_gradients_equal_dense_autograd(name):
    x, weight, bias, slot, geometry = conv_case(name)
    x.requires_grad_()
    bias.requires_grad_()
    y = lean_conv2d(x, weight, bias, slot, geometry)
    dense_weight = weight.detach().clone().requires_grad_()
    expected = dense_conv(x, dense_weight, bias, geometry)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    dx, db, dw = torch.autograd.grad(expected, (x, bias, dense_weight), dy)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(bias.grad, db)
    torch.testing.assert_close(slot.proxy.grad, channel_rows(dw, geometry.groups)[slot.channels])
    assert slot.proxy.grad.is_contiguous()


def moved_weight(slot, delta):
    """The slot's weight with delta [K, O/G, ...] added to its drawn part."""
    weight = slot.weight.detach().clone()
    out, group_size = weight.shape[0] // slot.groups, weight.shape[1]
    for row, c in zip(delta.detach(), slot.channels.tolist(), strict=True):
        weight[c // group_size * out :][:out, c % group_size] += row
    return weight


def gradcheck_subset(f, inputs, wanted):
    inputs = [tensor.detach().clone().requires_grad_(flag) for tensor, flag in zip(inputs, wanted, strict=True)]
    assert torch.autograd.gradcheck(f, inputs)


SUBSETS = [wanted for wanted in product([False, True], repeat=3) if any(wanted)]


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_conv_gradcheck_for_every_subset_of_wanted_gradients(name, wanted):
    """The proxy stands for the drawn part of the weight: a step of the one is a step of the other."""
    x, _, bias, slot, geometry = conv_case(name)

    def f(x, bias, delta):
        return _LeanConv2d.apply(x, moved_weight(slot, delta), bias, delta, slot.draw, geometry)

    gradcheck_subset(f, (x, bias, torch.zeros_like(slot.proxy)), wanted)


def linear_case(leading, channels=(0, 3, 4)):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64), requires_grad=False)
    slot = ChannelSlot("linear", weight, 1, "plan")
    slot.set(channels)
    return torch.randn(*leading, 6, dtype=torch.float64), weight, torch.randn(4, dtype=torch.float64), slot


@pytest.mark.parametrize("leading", [(4,), (2, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_linear_gradcheck_for_every_subset_of_wanted_gradients(leading, wanted):
    x, _, bias, slot = linear_case(leading)

    def f(x, bias, delta):
        return _LeanLinear.apply(x, moved_weight(slot, delta), bias, delta, slot.draw)

    gradcheck_subset(f, (x, bias, torch.zeros_like(slot.proxy)), wanted)


@pytest.mark.parametrize("leading", [(4,), (2, 3), (2, 3, 2)], ids=str)
def test_linear_gradients_equal_dense_autograd(leading):
    x, weight, bias, slot = linear_case(leading)
    x.requires_grad_()
    y = lean_linear(x, weight, bias, slot)
    dense = weight.detach().clone().requires_grad_()
    expected = F.linear(x, dense, bias)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(expected, (x, dense), dy)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(slot.proxy.grad, dw.t()[slot.channels])


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("drawn", ["none", "all"])
def test_conv_with_no_and_with_all_channels(name, drawn):
    cin = CONVOLUTIONS[name][0]
    x, weight, bias, slot, geometry = conv_case(name, [] if drawn == "none" else list(range(cin)))
    y = lean_conv2d(x, weight, bias, slot, geometry)
    assert y.requires_grad == (drawn == "all")
    if drawn == "all":
        dense = weight.detach().clone().requires_grad_()
        dy = torch.randn_like(y)
        (dw,) = torch.autograd.grad(dense_conv(x, dense, bias, geometry), dense, dy)
        y.backward(dy)
        torch.testing.assert_close(slot.proxy.grad, channel_rows(dw, geometry.groups))


def test_overhang_equals_padding_by_hand():
    x, weight, bias, slot, geometry = conv_case("strided, dilated")
    overhang = (0, 1, 2, 1)
    x.requires_grad_()
    y = lean_conv2d(x, weight, bias, slot, geometry._replace(overhang=overhang, padding=(0, 0)))
    dense = weight.detach().clone().requires_grad_()
    expected = F.conv2d(F.pad(x, overhang), dense, bias, geometry.stride, 0, geometry.dilation)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(expected, (x, dense), dy)
    y.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(slot.proxy.grad, dw.transpose(0, 1)[slot.channels])


def test_two_calls_of_one_layer_add_up():
    x, weight, bias, slot, geometry = conv_case("grouped")
    other = torch.randn_like(x)
    dense = weight.detach().clone().requires_grad_()
    (dense_conv(x, dense, bias, geometry) * dense_conv(other, dense, bias, geometry)).sum().backward()
    (lean_conv2d(x, weight, bias, slot, geometry) * lean_conv2d(other, weight, bias, slot, geometry)).sum().backward()
    torch.testing.assert_close(slot.proxy.grad, channel_rows(dense.grad, 3)[slot.channels])


@pytest.mark.parametrize("case", ["conv", "linear"])
def test_backward_twice_over_a_retained_graph_doubles_the_gradient(case):
    if case == "conv":
        x, weight, bias, slot, geometry = conv_case("plain")
        y = lean_conv2d(x, weight, bias, slot, geometry)
    else:
        x, weight, bias, slot = linear_case((3,))
        y = lean_linear(x, weight, bias, slot)
    y.sum().backward(retain_graph=True)
    once = slot.proxy.grad.clone()
    y.sum().backward()
    assert torch.equal(slot.proxy.grad, 2 * once)


def test_backward_after_a_new_draw_is_an_error():
    x, weight, bias, slot, geometry = conv_case("plain")
    y = lean_conv2d(x, weight, bias, slot, geometry)
    y.sum().backward(retain_graph=True)
    slot.set([1])
    with pytest.raises(RuntimeError, match="before the last resample"):
        y.sum().backward()


def test_a_slot_waits_from_forward_to_backward_and_not_under_no_grad():
    x, weight, bias, slot, geometry = conv_case("plain")
    with torch.no_grad():
        kept = lean_conv2d(x, weight, bias, slot, geometry)
    assert not slot.is_waiting
    y = lean_conv2d(x, weight, bias, slot, geometry)
    assert slot.is_waiting
    y.sum().backward()
    assert not slot.is_waiting
    y = lean_conv2d(x, weight, bias, slot, geometry)
    del y, kept
    gc.collect()
    assert not slot.is_waiting


def test_double_backward_is_refused():
    x, weight, bias, slot, geometry = conv_case("plain")
    y = lean_conv2d(x.requires_grad_(), weight, bias, slot, geometry)
    (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_weight_that_requires_a_gradient_is_refused():
    x, weight, bias, slot = linear_case((3,))
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match="requires a gradient"):
        lean_linear(x, weight, bias, slot)


@pytest.mark.parametrize("case", ["conv", "linear"])
def test_autocast_stores_what_the_product_saw(case):
    if case == "conv":
        x, weight, bias, slot, geometry = conv_case("plain")
    else:
        x, weight, bias, slot = linear_case((3,))
    x, bias = x.float().requires_grad_(), bias.float()
    weight.data = weight.data.float()
    slot.set([0, 2])
    kept = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with keep, torch.autocast("cpu", torch.bfloat16):
        y = lean_conv2d(x, weight, bias, slot, geometry) if case == "conv" else lean_linear(x, weight, bias, slot)
    assert y.dtype == torch.bfloat16
    assert [t.dtype for t in kept] == [torch.float32, torch.bfloat16]
    assert kept[0].data_ptr() == weight.data_ptr()  # no low-precision copy of a frozen weight
    y.float().sum().backward()
    assert x.grad.dtype == slot.proxy.grad.dtype == torch.float32


@pytest.mark.parametrize("wrong", [[0, 0], [5], [-1], [3, 1]])
def test_impossible_channels_are_refused_and_the_draw_stays(wrong):
    *_, slot, _ = conv_case("plain", [1, 2])
    with pytest.raises(ValueError, match="ascending ids"):
        slot.set(wrong)
    assert slot.channels.tolist() == [1, 2]
