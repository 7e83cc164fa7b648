"""Real networks of timm: golden training runs, and a table of families."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from test_optimizer import drawn_mask, masked_sgd_step

from trady_triton import TraDyOptimizer, apply_plan, make_plan, rank_layers, remove_plan

# name, image size
FAMILIES = {
    "mobilenetv2_035": 64,
    "mobilenetv3_small_050": 64,
    "mobilenetv4_conv_small_035": 64,
    "tf_efficientnet_lite0": 64,
    "efficientnet_b0": 64,
    "mnasnet_small": 64,
    "resnet10t": 64,
    "regnety_002": 64,
    "ghostnet_050": 64,
    "convnext_atto": 64,
    "mobilevit_xxs": 64,
    "vit_tiny_patch16_224": 224,
    "deit_tiny_patch16_224": 224,
    "swin_s3_tiny_224": 224,
    "mixer_s32_224": 224,
    "poolformer_s12": 64,
}


def net_and_batches(name, size, dtype, count=1, batch_size=2):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=4).to(dtype).eval()
    torch.nn.init.normal_(net.get_classifier().weight, std=0.1)  # some start at zero, which stops every gradient
    batches = [(torch.randn(batch_size, 3, size, size, dtype=dtype), torch.tensor([1, 3])) for _ in range(count)]
    for x, _ in batches:
        calibrate(net, x)
    return net, batches


@torch.no_grad()
def calibrate(net, x):
    """Running statistics of the data, without which the activations of an untrained net vanish or explode."""
    norms = [module for module in net.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = None
    net(x)
    for norm in norms:
        norm.eval()


@pytest.mark.parametrize("name", ["mobilenetv2_035", "tf_efficientnet_lite0", "convnext_atto"])
def test_two_epochs_of_steps_equal_dense_autograd_with_masked_gradients(name):
    net, batches = net_and_batches(name, 64, torch.float64, count=2)
    dense = copy.deepcopy(net)
    ranking = rank_layers(net, batches, F.cross_entropy)
    plan = make_plan(ranking, budget="512KiB", batch_size=2, dtype=torch.float64)
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=1e-3, weight_decay=1e-2)
    for epoch in range(2):
        optimizer.resample(epoch)
        masks = {layer: drawn_mask(dense, layer, ids) for layer, ids in plan.sample(epoch).items()}
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            masked_sgd_step(dense, masks, (x, y), lr=1e-3, weight_decay=1e-2, head=plan.head)
    for key, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, dense.state_dict()[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_planned_patched_and_moves_selected_columns_only(name):
    net, batches = net_and_batches(name, FAMILIES[name], torch.float32)
    x, y = batches[0]
    expected, before = net(x), copy.deepcopy(net.state_dict())
    plan = make_plan(rank_layers(net, batches, F.cross_entropy), budget="2MiB", batch_size=2, seed=1)
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    channels = optimizer.resample(0)
    output = net(x)
    assert torch.equal(output, expected)
    F.cross_entropy(output, y).backward()
    optimizer.step()
    moved = 0
    for key, tensor in net.state_dict().items():
        layer, changed = key.removesuffix(".weight"), tensor != before[key]
        if layer in plan.pool and key.endswith(".weight"):
            assert not changed[~drawn_mask(net, layer, channels[layer])].any()
            moved += int(changed.sum())
        elif not any(key.startswith(head) for head in plan.head):
            assert not changed.any()
    assert moved > 0
    assert all((net.get_parameter(f"{head}.weight") != before[f"{head}.weight"]).any() for head in plan.head)
    remove_plan(net).load_state_dict(before, strict=True)
    assert torch.equal(net(x), expected)
