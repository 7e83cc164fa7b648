"""The paper's nets: their structure, the costs that the paper prints for them, and timm's model protocol."""

import pytest
import timm
import torch
from torch import nn

from trady_triton.models import su_layers
from trady_triton.models.paper_archs import conv_names

# convolutions, weights, inputs at 128 px (TraDy, arXiv 2510.19675; batch 1, head and norms excluded)
TOTALS = {
    "mobilenetv2_w035": (52, 288_864, 963_456),
    "mcunet_in1": (42, 463_216, 846_592),
    "proxylessnas_w03": (61, 357_680, 804_352),
}
# weights, inputs
SCHEME_COSTS = {
    ("mobilenetv2_w035", "s1"): (22_410, 5_872),
    ("mobilenetv2_w035", "s3"): (55_920, 10_672),
    ("mobilenetv2_w035", "s5"): (81_792, 11_904),
    ("mcunet_in1", "s1"): (12_096, 3_840),
    ("mcunet_in1", "s3"): (52_480, 12_352),
    ("mcunet_in1", "s5"): (98_560, 14_080),
    ("proxylessnas_w03", "s1"): (20_736, 5_248),
    ("proxylessnas_w03", "s3"): (62_976, 9_984),
    ("proxylessnas_w03", "s5"): (89_088, 12_288),
}
every_net = pytest.mark.parametrize("name", TOTALS)


def called_convs(name: str) -> list[tuple[str, nn.Conv2d, torch.Size]]:
    """Name, module and input shape of every convolution, in order of call, for one image of 128 px."""
    net, calls = timm.create_model(name).eval(), []
    for path, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, args, _, path=path: calls.append((path, conv, args[0].shape)))
    with torch.no_grad():
        net(torch.zeros(1, 3, 128, 128))
    return calls


def scheme_cost(name: str, scheme: str, depthwise_weights: int | None = None) -> tuple[int, int]:
    """Weights and inputs of the channels that a scheme trains; a depthwise channel may be charged another weight."""
    ratios, weights, inputs = su_layers(name, scheme), 0, 0
    for path, conv, (_, channels, height, width) in called_convs(name):
        active = int(channels * ratios.get(path, 0))
        depthwise = conv.groups == channels
        charge = depthwise_weights if depthwise and depthwise_weights else conv.weight.numel() // channels
        weights += active * charge
        inputs += active * height * width
    return weights, inputs


@every_net
def test_totals_are_those_of_the_paper(name):
    calls = called_convs(name)
    weights = sum(conv.weight.numel() for _, conv, _ in calls)
    assert (len(calls), weights, sum(shape.numel() for *_, shape in calls)) == TOTALS[name]


@every_net
def test_layer_indices_follow_the_order_of_call(name):
    assert conv_names(name) == [path for path, *_ in called_convs(name)]


@every_net
def test_paper_form_has_a_norm_behind_every_bias_free_conv(name):
    modules = list(timm.create_model(name).modules())
    convs = [module for module in modules if type(module) is nn.Conv2d]
    norms = [module for module in modules if type(module) is nn.BatchNorm2d]
    assert all(conv.bias is None for conv in convs)
    assert [conv.out_channels for conv in convs] == [norm.num_features for norm in norms]


@every_net
def test_activations_are_relu6_after_all_but_the_projections(name):
    net = timm.create_model(name)
    activations = [path.removesuffix("_act") for path, module in net.named_modules() if isinstance(module, nn.ReLU6)]
    assert activations == [path for path in conv_names(name) if not path.endswith("pw2")]


@every_net
def test_blocks_that_keep_their_shape_add_their_input(name):
    net = timm.create_model(name).eval()
    for block in net.blocks:
        nn.init.zeros_(block.pw2.weight)
        first = block.pw1 if block.has_expansion else block.dw
        x = torch.ones(1, first.in_channels, 8, 8)
        y = block(x)
        assert torch.equal(y, x if y.shape == x.shape else torch.zeros_like(y))


@every_net
def test_folded_form_has_biases_and_no_norm(name):
    net = timm.create_model(name, norm_layer=nn.Identity, feature_mix=False)
    convs = {path: module for path, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert list(convs) == [path for path in conv_names(name) if path != "feature_mix"]
    assert all(conv.bias is not None for conv in convs.values())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize(("name", "scheme"), SCHEME_COSTS)
def test_sparse_update_schemes_cost_what_the_paper_says(name, scheme):
    assert scheme_cost(name, scheme) == SCHEME_COSTS[name, scheme]


def test_papers_charge_of_a_depthwise_channel_gives_its_smallest_budget():
    assert sum(scheme_cost("mobilenetv2_w035", "s1")) == 28_282
    assert sum(scheme_cost("mobilenetv2_w035", "s1", depthwise_weights=1)) == 27_946


def test_unknown_net_or_scheme_is_named():
    with pytest.raises(ValueError, match=r"'resnet18'.*mcunet_in1"):
        su_layers("resnet18", "s1")
    with pytest.raises(ValueError, match=r"'s9'.*s1, s3, s5"):
        su_layers("mcunet_in1", "s9")


@every_net
def test_head_protocol(name):
    net = timm.create_model(name, num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    maps = net.forward_features(x)
    assert maps.shape == (2, net.num_features, 2, 2)
    pooled = net.forward_head(maps, pre_logits=True)
    torch.testing.assert_close(pooled, maps.mean((2, 3)))
    torch.testing.assert_close(net(x), net.get_classifier()(pooled))
    assert net.head_hidden_size == net.num_features == net.get_classifier().in_features
    assert net.get_classifier() is net.get_submodule(net.pretrained_cfg["classifier"])


@every_net
def test_reset_classifier(name):
    net = timm.create_model(name, num_classes=7).eval()
    x = torch.zeros(1, 3, 32, 32)
    net.reset_classifier(3)
    assert (net.num_classes, net(x).shape) == (3, (1, 3))
    net.reset_classifier(0)
    assert net(x).shape == (1, net.num_features)
    net.reset_classifier(0, global_pool="")
    assert net(x).shape == (1, net.num_features, 1, 1)


@every_net
def test_grad_checkpointing_recomputes_and_equals_the_plain_step(name):
    net = timm.create_model(name, num_classes=4).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calls, results = [], []
    net.blocks[1].dw.register_forward_hook(lambda *_: calls.append(net.grad_checkpointing))
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        net.zero_grad()
        out = net(x)
        out.square().sum().backward()
        results.append([out.detach(), *(parameter.grad for parameter in net.parameters())])
    assert calls == [False, True, True]
    torch.testing.assert_close(results[0], results[1])


@every_net
def test_state_dict_round_trip_is_strict(name):
    one, other = timm.create_model(name).eval(), timm.create_model(name).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(x), other(x))


@every_net
def test_feature_pyramid(name):
    net = timm.create_model(name, features_only=True, in_chans=1).eval()
    maps = net(torch.zeros(1, 1, 64, 64))
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == net.feature_info.reduction() == [2, 4, 8, 16, 32]


@every_net
def test_every_parameter_outside_the_head_has_a_layer_group(name):
    net = timm.create_model(name)
    groups = timm.models.group_parameters(net, net.group_matcher())
    grouped = [parameter for members in groups.values() for parameter in members]
    assert sorted(grouped) == sorted(dict(net.named_parameters()))
    assert len(groups) > len(net.blocks)


def test_drop_rate_reaches_the_head():
    net = timm.create_model("mcunet_in1", drop_rate=0.3)
    assert net.head_drop.p == 0.3


def test_the_norm_may_be_given_by_name():
    assert not any(
        isinstance(m, nn.BatchNorm2d) for m in timm.create_model("mcunet_in1", norm_layer="identity").modules()
    )
    with pytest.raises(ValueError, match="'identty'"):
        timm.create_model("mcunet_in1", norm_layer="identty")
