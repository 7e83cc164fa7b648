"""Whole ReLU-family networks under a plan: the gradients of the plain network, for a hundredth of the bytes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from kept import kept_bytes
from nets import plan_at, random_net
from torch._subclasses.fake_tensor import FakeTensorMode

from trady_triton import apply_plan, remove_plan

CNNS = ["mobilenetv2_100", "tf_efficientnet_lite0", "resnet18", "resnet50"]


@pytest.mark.parametrize("name", CNNS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_planned_net_has_the_gradients_of_the_plain_one(name, layout):
    plain = random_net(name).to(memory_format=layout)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64).to(memory_format=layout)
    model = copy.deepcopy(plain)
    plan = plan_at(model, x, (0.0, 0.3, 0.8))
    apply_plan(model, plan)
    drawn = {layer: range(0, plan.shapes[layer].in_channels, 2) for layer in plan.pool}
    for layer, channels in drawn.items():
        model.get_submodule(layer).slot.set(channels)
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = model(leaves[0]), plain(leaves[1])
    assert torch.equal(*outputs)
    for y in outputs:
        y.square().sum().backward()
    assert_same(leaves[0].grad, leaves[1].grad)
    for layer, channels in drawn.items():
        dense = plain.get_submodule(layer).weight.grad[:, list(channels)]
        assert_same(model.get_submodule(layer).slot.proxy.grad, dense.transpose(0, 1))
    for head in plan.head:
        assert_same(model.get_submodule(head).weight.grad, plain.get_submodule(head).weight.grad)


@pytest.mark.parametrize("name", [*CNNS, "mobilenetv4_conv_small", "vgg11_bn"])
def test_keeps_a_hundredth_of_full_fine_tuning(name):
    with FakeTensorMode():
        model, x = timm.create_model(name).eval(), torch.empty(8, 3, 224, 224)
        full = kept_bytes(lambda: model(x), model)[1]
        plan = plan_at(model, x, (0.25,))
        apply_plan(model, plan)
        model.get_submodule(plan.pool[0]).slot.set((0, 1))
        lean = kept_bytes(lambda: model(x), model)[1]
    assert full >= 100 * lean, f"{full / 1e6:.1f} MB / {lean / 1e6:.2f} MB"


def test_remove_plan_brings_every_class_back():
    model = random_net("mobilenetv2_100")
    classes = [type(module) for module in model.modules()]
    plan = plan_at(model, torch.zeros(1, 3, 32, 32, dtype=torch.float64), (0.5,))
    remove_plan(apply_plan(model, plan))
    assert [type(module) for module in model.modules()] == classes


def assert_same(lean: torch.Tensor, plain: torch.Tensor) -> None:
    """Equal to 1e-10 of the largest element."""
    torch.testing.assert_close(lean, plain, rtol=0, atol=1e-10 * plain.abs().max().item())
