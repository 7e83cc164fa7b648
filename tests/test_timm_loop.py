"""What timm's own training script does to model and optimizer, done to a planned model."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from test_optimizer import drawn_mask
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from timm.utils.model import freeze_batch_norm_2d, unfreeze_batch_norm_2d

from trady_triton import TraDyOptimizer, apply_plan, make_plan, rank_layers, remove_plan
from trady_triton.nn import LeanConv2d

NET = "test_efficientnet"


def batches(count=2, classes=3):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(4, 3, 32, 32, generator=generator), torch.randint(classes, (4,), generator=generator))
        for _ in range(count)
    ]


def plain(classes=3):
    torch.manual_seed(0)
    return timm.create_model(NET, num_classes=classes).eval()


def planned(net=None, **options):
    net = net or plain()
    plan = make_plan(rank_layers(net, batches(1), F.cross_entropy), budget=20000, **options)
    return apply_plan(net, plan), plan


def train(net, optimizer, epochs=1, start=0):
    for epoch in range(start, start + epochs):
        optimizer.resample(epoch)
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()


def copied(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def moved(net, before):
    return {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "filter_bias_and_bn": False}])
def test_the_registry_makes_the_optimizer_of_a_planned_model(options):
    net, plan = planned()
    assert "trady" in list_optimizers()
    optimizer = create_optimizer_v2(net, opt="trady", lr=0.1, momentum=0.9, **options)
    assert isinstance(optimizer, TraDyOptimizer)
    assert optimizer.plan is plan
    decay = options.get("weight_decay", 0.0)
    twin = apply_plan(plain(), plan)
    bias = [twin.classifier.bias]
    weights = [twin.classifier.weight, *(twin.get_submodule(name).weight for name in plan.pool)]
    bias_decay = 0.0 if options.get("filter_bias_and_bn", True) else decay
    groups = [{"params": bias, "weight_decay": bias_decay}, {"params": weights, "weight_decay": decay}]
    reference = TraDyOptimizer(groups, plan, lr=0.1)
    for model, opt in ((net, optimizer), (twin, reference)):
        train(model, opt, epochs=2)
    assert equal(net.state_dict(), twin.state_dict())


def test_the_registry_knows_momentum_and_adamw():
    momentum = create_optimizer_v2(planned(optimizer="momentum")[0], opt="tradymomentum", lr=0.1, momentum=0.8)
    assert [group["momentum"] for group in momentum.param_groups] == [0.8]
    adamw = create_optimizer_v2(planned(optimizer="adamw")[0], opt="tradyadamw", lr=0.1, betas=(0.5, 0.9), eps=1e-6)
    assert adamw.algorithm == "adamw"
    assert [(group["betas"], group["eps"]) for group in adamw.param_groups] == [((0.5, 0.9), 1e-6)]


def test_the_registry_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"layer_decay.*param_group_fn"):
        create_optimizer_v2(planned()[0], opt="trady", lr=0.1, layer_decay=0.7)
    with pytest.raises(TypeError, match="the parameters lead to none"):
        create_optimizer_v2(plain(), opt="trady", lr=0.1)


def test_a_group_function_gives_each_part_its_rate():
    net, plan = planned()

    def groups(model):
        return [
            {"params": [model.get_submodule(name).weight for name in plan.pool], "lr": 0.0},
            {"params": model.classifier.parameters(), "lr": 0.1},
        ]

    optimizer = create_optimizer_v2(net, opt="trady", param_group_fn=groups)
    before = copied(net)
    train(net, optimizer)
    assert moved(net, before) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("sched", ["cosine", "step", "poly"])
def test_a_scheduler_sets_the_rate_of_compact_and_whole_parameters(sched):
    net, _ = planned()
    optimizer = create_optimizer_v2(net, opt="trady", lr=0.1, weight_decay=0.1)
    scheduler, epochs = create_scheduler_v2(optimizer, sched, num_epochs=4, decay_epochs=1, warmup_epochs=2)
    rates = []
    for epoch in range(epochs):
        before = copied(net)
        train(net, optimizer, start=epoch)
        rates.append([group["lr"] for group in optimizer.param_groups])
        assert {"classifier.bias", "classifier.weight"} < moved(net, before)
        scheduler.step(epoch + 1)
    assert rates[0] == [1e-5, 1e-5]
    assert len({rate for rate, _ in rates}) > 2
    assert all(rate == other for rate, other in rates)


def test_the_average_of_weights_follows_a_planned_model():
    net, _ = planned()
    optimizer = create_optimizer_v2(net, opt="trady", lr=0.1)
    ema = ModelEmaV3(net, decay=0.75)
    expected = copied(net)
    for epoch in range(3):
        train(net, optimizer, start=epoch)
        ema.update(net, step=epoch + 2)
        for name, tensor in net.state_dict().items():
            expected[name] = torch.lerp(expected[name], tensor, 0.25) if tensor.is_floating_point() else tensor
    for name, tensor in ema.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    x, _ = batches(1)[0]
    reference = plain()
    reference.load_state_dict(ema.module.state_dict())
    torch.testing.assert_close(ema.module(x), reference(x))


def test_a_saved_checkpoint_resumes_bit_for_bit(tmp_path):
    net, plan = planned()
    optimizer, scaler, ema = create_optimizer_v2(net, opt="trady", lr=0.1), NativeScaler("cpu"), ModelEmaV3(net)
    saver = CheckpointSaver(net, optimizer, model_ema=ema, amp_scaler=scaler, checkpoint_dir=str(tmp_path))
    train(net, optimizer, epochs=2)
    saver.save_checkpoint(epoch=1, metric=0.5)
    train(net, optimizer, epochs=1, start=2)

    other = apply_plan(plain(), plan)
    resumed = create_optimizer_v2(other, opt="trady", lr=0.7)
    start = resume_checkpoint(other, tmp_path / "last.pth.tar", resumed, NativeScaler("cpu"), log_info=False)
    assert (start, resumed.epoch) == (2, 1)
    train(other, resumed, epochs=1, start=2)
    assert equal(other.state_dict(), net.state_dict())
    whole = plain()
    load_checkpoint(whole, str(tmp_path / "model_best.pth.tar"), use_ema=False, strict=True)


@pytest.mark.parametrize("mode", ["norm", "value"])
def test_the_scaler_clips_compact_and_whole_gradients_once(mode):
    net, plan = planned()
    optimizer = create_optimizer_v2(net, opt="trady", lr=0.1)
    scaler = NativeScaler("cpu")
    channels = optimizer.resample(0)
    before = copied(net)
    x, y = batches(1)[0]
    dense = plain()
    F.cross_entropy(dense(x), y).backward()
    masks = {f"{name}.weight": drawn_mask(dense, name, channels.get(name, ())) for name in plan.pool}
    steps = {name: dense.get_parameter(name).grad * mask for name, mask in masks.items()}
    steps |= {f"classifier.{name}": getattr(dense.classifier, name).grad for name in ("weight", "bias")}
    norm = torch.stack([grad.norm() for grad in steps.values()]).norm()
    limit = 0.25 * (norm if mode == "norm" else max(grad.abs().max() for grad in steps.values()))
    tensors = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler(F.cross_entropy(net(x), y), optimizer, clip_grad=float(limit), clip_mode=mode, parameters=tensors)
    for name, tensor in net.state_dict().items():
        if name in steps:
            grad = 0.25 * steps[name] if mode == "norm" else steps[name].clamp(-limit, limit)
            torch.testing.assert_close(tensor, before[name] - 0.1 * grad, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("when", ["before", "after"])
def test_batch_norm_may_be_frozen_before_and_after_the_plan(when):
    net = plain()
    x, _ = batches(1)[0]
    expected = net(x)
    if when == "before":
        net, _ = planned(freeze_batch_norm_2d(net))
    else:
        net, _ = planned(net)
        freeze_batch_norm_2d(net)
    torch.testing.assert_close(net.train()(x), expected)
    before = copied(net)
    train(net, create_optimizer_v2(net, opt="trady", lr=0.1))
    assert not {name for name in moved(net, before) if "bn" in name}
    assert {name for name in moved(net, before) if "conv" in name}
    remove_plan(net)
    back = unfreeze_batch_norm_2d(net).eval()
    missing = back.load_state_dict(plain().state_dict(), strict=True)
    assert not missing.missing_keys
    torch.testing.assert_close(back(x), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_classifier_may_be_reset_before_and_after_the_plan(when):
    net = plain(classes=7)
    if when == "before":
        net.reset_classifier(3)
        net, plan = planned(net)
    else:
        plan = make_plan(rank_layers(net, batches(1), F.cross_entropy), budget=20000)
        apply_plan(net, plan).reset_classifier(3)
    assert net(batches(1)[0][0]).shape == (4, 3)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    before = copied(net)
    train(net, optimizer)
    assert {"classifier.weight", "classifier.bias"} < moved(net, before)
    assert any(f"{name}.weight" in moved(net, before) for name in plan.pool)
    optimizer.resample(1)
    remove_plan(net)
    assert not any(isinstance(module, LeanConv2d) for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_weights_go_both_ways_between_planned_and_plain():
    net, _ = planned()
    train(net, create_optimizer_v2(net, opt="trady", lr=0.1))
    other = plain()
    other.load_state_dict(net.state_dict(), strict=True)
    assert equal(other.state_dict(), net.state_dict())
    fresh = timm.create_model(NET, num_classes=3)
    net.load_state_dict(fresh.state_dict(), strict=True)
    assert equal(net.state_dict(), fresh.state_dict())
    x, _ = batches(1)[0]
    torch.testing.assert_close(net(x), copy.deepcopy(fresh).eval()(x))
