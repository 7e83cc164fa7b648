"""Every policy on every family of timm nets: forward bits, gradients, and a ledger that is predicted to the byte."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import plan_at, random_net
from test_recompute import gradients
from torch import Tensor, nn

import trady_triton.models  # noqa: F401  registers the paper's nets
from trady_triton import Policy, TraDyOptimizer, apply_plan, choose_recompute, ledger, measure
from trady_triton.cost import CostModel
from trady_triton.ledger import Ledger
from trady_triton.plan import Plan

# name -> (small image, options that go with it): for gradients in float64
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "mobilenetv2_035": (64, {}),
    "mobilenetv2_100": (64, {}),
    "mobilenetv3_large_100": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "mnasnet_100": (64, {}),
    "tf_efficientnet_lite0": (64, {}),
    "efficientnet_b0": (64, {}),
    "fbnetc_100": (64, {}),
    "ghostnet_100": (64, {}),
    "resnet18": (64, {}),
    "resnet50": (64, {}),
    "regnety_008": (64, {}),
    "densenet121": (64, {}),
    "vgg11_bn": (64, {}),
    "convnext_tiny": (64, {}),
    "convnextv2_atto": (64, {}),
    "vit_tiny_patch16_224": (64, {"img_size": 64}),
    "vit_base_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "deit3_small_patch16_224": (64, {"img_size": 64}),
    "swin_tiny_patch4_window7_224": (112, {"img_size": 112, "depths": (1, 2, 1)}),
    "mobilevit_s": (64, {}),
    "efficientvit_b0": (64, {}),
    "mixer_s16_224": (64, {"img_size": 64}),
    "poolformer_s12": (64, {}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56}),
    "maxvit_tiny_tf_224": (64, {"img_size": 64}),
    "coatnet_0_rw_224": (64, {"img_size": 64}),
    "mobilenetv2_w035": (64, {}),
    "mcunet_in1": (64, {}),
    "proxylessnas_w03": (64, {}),
}
# One small net of each further family, for one exact and one approximate policy.
MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "cait_xxs24_224": (64, {"img_size": 64, "depth": 2}),
    "coat_tiny": (64, {"img_size": 64}),
    "convit_tiny": (64, {"img_size": 64}),
    "davit_tiny": (64, {"depths": (1, 1, 1, 1)}),
    "eca_botnext26ts_256": (128, {"img_size": 128}),
    "edgenext_xx_small": (64, {}),
    "focalnet_tiny_srf": (64, {}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
    "mambaout_femto": (64, {}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "resnest14d": (64, {}),
    "resnet50_gn": (64, {}),
    "skresnet18": (64, {}),
    "starnet_s050": (64, {}),
    "twins_svt_small": (64, {"img_size": 64}),
    "volo_d1_224": (64, {"img_size": 64}),
    "xcit_nano_12_p8_224": (64, {"img_size": 64}),
}
IN_CI = ("convnextv2_atto", "efficientvit_b0")
POLICIES = {
    "lean": Policy(),
    "attention": Policy(attention="recompute"),
    "8 bits": Policy(activations=8, attention="recompute"),
    "2 bits": Policy(activations=2),
    "blocks": None,  # what choose_recompute takes
}
# Types that hold bytes and that nobody taught, by net: the ledger names them.
NOT_LEAN = {
    "swin_tiny_patch4_window7_224": {"Softmax"},  # of the attention that is kept
    "focalnet_tiny_srf": {"FocalModulation"},  # products, as in the next three
    "gmlp_ti16_224": {"SpatialGatingUnit"},
    "mambaout_femto": {"GatedConvBlock"},
    "starnet_s050": {"Block"},
    "ghostnet_100": {"GhostNet"},  # F.dropout before the classifier, where blocks that run twice keep little else
    "skresnet18": {"SelectiveKernel"},
}
each_family = pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)


def small(name: str) -> tuple[nn.Module, Tensor]:
    size, options = (FAMILIES | MORE)[name]
    model = random_net(name, **options)
    nn.init.normal_(model.get_classifier().weight, std=0.1)  # some start at zero, which stops every gradient
    return model, torch.randn(2, 3, size, size, dtype=torch.float64)


@each_family
@pytest.mark.parametrize("policy", ["lean", "attention", "blocks"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_exact_policies_have_the_gradients_of_the_plain_net(name: str, policy: str, layout: torch.memory_format):
    assert_exact(name, policy, layout)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_further_families_have_exact_gradients_and_a_ledger_to_the_byte(name: str):
    assert_exact(name, "attention", torch.contiguous_format)
    size, options = MORE[name]
    model = timm.create_model(name, **options)
    assert_predicted(name, model, torch.randn(2, 3, size, size), "8 bits", None)


def assert_exact(name: str, policy: str, layout: torch.memory_format) -> None:
    plain, x = small(name)
    plain, x = plain.to(memory_format=layout), x.to(memory_format=layout)
    model = copy.deepcopy(plain)
    plan = under(policy, plan_at(model, x, (0.0, 0.4, 0.9)), model, tuple(x.shape))
    drawn = {layer: range(0, plan.shapes[layer].in_channels, 2) for layer in plan.pool}
    apply_plan(model, plan)
    for layer, channels in drawn.items():
        model.get_submodule(layer).slot.set(channels)
    lean, dense = (gradients(net, x, drawn, plan.head[0]) for net in (model, plain))
    # Compared frozen: torch itself folds the batch of a Linear otherwise where its weight requires a gradient.
    assert torch.equal(lean[0], plain.requires_grad_(False)(x))
    for ours, theirs in zip(lean[1:], dense[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * theirs.abs().max().item())


@each_family
@pytest.mark.parametrize("bits", [8, 2])
def test_approximate_policies_keep_the_forward_and_point_the_same_way(name: str, bits: int):
    plain, x = small(name)
    plan = plan_at(plain, x, (0.9,))
    drawn = {layer: range(plan.shapes[layer].in_channels) for layer in plan.pool}
    results = []
    for policy in (Policy(), Policy(activations=bits)):
        model = apply_plan(copy.deepcopy(plain), replace(plan, policy=policy))
        for layer, channels in drawn.items():
            model.get_submodule(layer).slot.set(channels)
        results.append(gradients(model, x, drawn, plan.head[0]))
    (y, _, exact, _), (lean_y, _, packed, _) = results
    assert torch.equal(lean_y, y)
    assert F.cosine_similarity(packed.flatten(), exact.flatten(), 0) > (0.999 if bits == 8 else 0.7)


@each_family
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["float32", "bf16", "nhwc"])
def test_a_ledger_at_full_size_is_predicted_to_the_byte(name: str, policy: str, mode: str):
    torch.manual_seed(0)
    layout = torch.channels_last if mode == "nhwc" else torch.contiguous_format
    model = timm.create_model(name).to(memory_format=layout)
    size = 128 if name in ("mobilenetv2_w035", "mcunet_in1", "proxylessnas_w03") else 224
    x = torch.randn(2, 3, size, size).to(memory_format=layout)
    assert_predicted(name, model, x, policy, torch.bfloat16 if mode == "bf16" else None)


def assert_predicted(name: str, model: nn.Module, x: Tensor, policy: str, autocast: torch.dtype | None) -> None:
    plan = plan_at(model.eval(), x[:1], (0.25, 0.6))
    plan = replace(plan, cost=CostModel(2, 4, 4, unit="bytes"), budget=2**18)
    plan = under(policy, plan, model, tuple(x.shape))
    predicted = ledger(model, plan, x.shape, autocast=autocast)
    optimizer = TraDyOptimizer(apply_plan(model, plan).parameters(), plan, lr=0.1)
    optimizer.resample(0)
    measured = measure(model, optimizer, x, torch.arange(2), autocast=autocast)
    assert measured.kept_by_layer == predicted.kept_by_layer
    assert abs(measured.peak_bytes - predicted.peak_bytes) <= 0.01 * measured.peak_bytes
    assert untaught(measured) <= NOT_LEAN.get(name, set())


def untaught(books: Ledger) -> set[str]:
    """Types that nobody taught and that keep a hundredth of all bytes or more."""
    return {kind for kind, layers in books.not_lean.items() if sum(layers.values()) * 100 >= books.kept_bytes}


def under(policy: str, plan: Plan, model: nn.Module, shape: tuple[int, ...]) -> Plan:
    chosen = POLICIES[policy]
    return choose_recompute(plan, model, shape) if chosen is None else replace(plan, policy=chosen)
