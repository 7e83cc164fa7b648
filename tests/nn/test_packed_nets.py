"""The error that packing brings to the weight gradient of an early layer, which has crossed the whole network."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nets import plan_at, random_net
from torch import Tensor, nn

from trady_triton import apply_plan
from trady_triton.plan import Plan
from trady_triton.policy import Policy

NETS = {
    "efficientnet_b0": (64, {}),
    "mobilenetv3_large_100": (64, {}),
    "vit_tiny_patch16_224": (64, {"img_size": 64}),
    "convnext_atto": (64, {}),
}


@pytest.mark.parametrize("name", NETS)
def test_eight_bits_err_by_less_than_two_percent(name):
    exact, packed = (early_wgrad(name, activations) for activations in ("exact", 8))
    assert (packed - exact).norm() <= 0.02 * exact.norm()
    assert F.cosine_similarity(packed, exact, 0) >= 0.9995


def test_two_bits_point_the_same_way_in_a_transformer():
    exact, packed = (early_wgrad("vit_tiny_patch16_224", activations) for activations in ("exact", 2))
    assert F.cosine_similarity(packed, exact, 0) >= 0.9


def early_wgrad(name: str, activations: str | int) -> Tensor:
    """The flat compact dW of the layer at 25 % depth, in float64."""
    size, options = NETS[name]
    model = random_net(name, **options)
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    calibrate(model, x)
    plan: Plan = plan_at(model, x, (0.25,))
    model = apply_plan(copy.deepcopy(model), replace(plan, policy=Policy(activations=activations)))
    slot = model.get_submodule(plan.pool[0]).slot
    slot.set(range(0, plan.shapes[plan.pool[0]].in_channels, 2))
    F.cross_entropy(model(x), torch.arange(4)).backward()
    return slot.proxy.grad.flatten()


def calibrate(model: nn.Module, x: Tensor) -> None:
    """Give every BatchNorm the statistics of x: with those of an untrained net the signal dies on its way."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    model.eval()
