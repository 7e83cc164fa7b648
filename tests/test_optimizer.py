"""TraDyOptimizer: steps, draws, state, and the mistakes it must not forgive."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from toys import toy_batches, toy_net, toy_plan

from trady_triton import TraDyOptimizer, apply_plan, remove_plan


def planned(budget: int = 1200, lr: float | torch.Tensor = 0.1, weight_decay: float = 0.0, **options):
    net = toy_net()
    plan = toy_plan(net, budget, **options)
    apply_plan(net, plan)
    return net, plan, TraDyOptimizer(net.parameters(), plan, lr=lr, weight_decay=weight_decay)


def train_step(net, optimizer, batch=None):
    x, y = batch or toy_batches()[0]
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()


def weights(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def drawn_mask(net, name, channels):
    """True where the dense weight of a layer belongs to a drawn input channel."""
    layer = net.get_submodule(name)
    groups, group_size = getattr(layer, "groups", 1), layer.weight.shape[1]
    out = layer.weight.shape[0] // groups
    mask = torch.zeros_like(layer.weight, dtype=torch.bool)
    for c in channels:
        mask[c // group_size * out : (c // group_size + 1) * out, c % group_size] = True
    return mask


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_only_drawn_channels_and_the_head_move(weight_decay):
    net, plan, optimizer = planned(weight_decay=weight_decay)
    channels = optimizer.resample(0)
    assert channels == plan.sample(0)
    before = weights(net)
    train_step(net, optimizer)
    moved = 0
    for name, tensor in net.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in plan.pool:
            mask = drawn_mask(net, layer, channels[layer])
            assert torch.equal(tensor[~mask], before[name][~mask])
            moved += int((tensor != before[name]).sum())
            assert (
                not channels[layer] or (tensor != before[name])[mask].float().mean() > 0.5
            )  # ReLU leaves some at zero
        else:
            assert torch.equal(tensor, before[name]) != name.startswith("head")
    assert moved > 0


def test_steps_at_a_budget_that_covers_everything_equal_torch_sgd():
    net, plan, optimizer = planned(10**7, lr=0.05, weight_decay=0.01)
    dense = toy_net()
    trained = [p for name, p in dense.named_parameters() if name.split(".")[0] == "head" or name.endswith("weight")]
    reference = torch.optim.SGD([p for p in trained if p is not dense.norm.weight], lr=0.05, weight_decay=0.01)
    optimizer.resample(0)
    for batch in toy_batches(4):
        train_step(net, optimizer, batch)
        train_step(dense, reference, batch)
    assert plan.used(plan.sample(0)) == plan.pool_cost
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, dense.state_dict()[name], rtol=1e-12, atol=1e-14)


def test_two_epochs_equal_dense_autograd_with_masked_gradients():
    net, plan, optimizer = planned(weight_decay=0.1)
    dense = toy_net()
    for epoch in range(2):
        optimizer.resample(epoch)
        masks = {name: drawn_mask(dense, name, ids) for name, ids in plan.sample(epoch).items()}
        for x, y in toy_batches(2):
            train_step(net, optimizer, (x, y))
            masked_sgd_step(dense, masks, (x, y), lr=0.1, weight_decay=0.1)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, dense.state_dict()[name], rtol=1e-10, atol=1e-12)


def masked_sgd_step(dense, masks, batch, lr, weight_decay, head=("head",)):
    """SGD on dense gradients times a mask; the head whole, everything else not at all."""
    dense.zero_grad()
    F.cross_entropy(dense(batch[0]), batch[1]).backward()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            mask = masks.get(name.removesuffix(".weight"), torch.tensor(name.startswith(tuple(head))))
            parameter -= lr * mask.double() * (parameter.grad + weight_decay * parameter)


def test_accumulated_micro_batches_equal_one_batch():
    (x, y) = toy_batches(size=6)[0]
    whole, _, optimizer = planned()
    optimizer.resample(0)
    train_step(whole, optimizer, (x, y))
    parts, _, optimizer = planned()
    optimizer.resample(0)
    for part in (slice(0, 4), slice(4, 6)):
        (F.cross_entropy(parts(x[part]), y[part]) * len(y[part]) / len(y)).backward()
    optimizer.step()
    for name, tensor in parts.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-12, atol=1e-14)


def test_clipping_over_the_groups_sees_compact_and_dense_gradients():
    net, _, optimizer = planned()
    dense = toy_net()
    channels = optimizer.resample(0)
    for model in (net, dense):
        F.cross_entropy(model(toy_batches()[0][0]), toy_batches()[0][1]).backward()
    squares = [dense.get_parameter(f"{n}.weight").grad[drawn_mask(dense, n, ids)] for n, ids in channels.items()]
    expected = torch.cat([*squares, dense.head.weight.grad.flatten(), dense.head.bias.grad]).norm()
    total = clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1e9)
    torch.testing.assert_close(total, expected)


def test_resampling_the_installed_epoch_changes_nothing():
    net, _, optimizer = planned()
    optimizer.resample(3)
    F.cross_entropy(net(toy_batches()[0][0]), toy_batches()[0][1]).backward()
    proxies = list(optimizer.param_groups[0]["params"])
    optimizer.resample(3)
    assert all(a is b for a, b in zip(proxies, optimizer.param_groups[0]["params"], strict=True))
    assert optimizer.epoch == 3


def test_resample_without_an_epoch_goes_on_to_the_next():
    _, plan, optimizer = planned()
    assert [optimizer.resample() for _ in range(3)] == [plan.sample(epoch) for epoch in range(3)]
    assert optimizer.epoch == 2


def test_resample_between_forward_and_backward_is_an_error():
    net, _, optimizer = planned()
    optimizer.resample(0)
    loss = net(toy_batches()[0][0]).sum()
    with pytest.raises(RuntimeError, match="waits for its backward"):
        optimizer.resample(1)
    assert optimizer.epoch == 0
    loss.backward()
    waiting = net(toy_batches()[0][0]).sum()
    optimizer.step()  # which draws nothing
    del waiting
    optimizer.resample(1)  # the gradients were applied: nothing is lost


def test_resample_with_pending_gradients_is_an_error():
    net, _, optimizer = planned()
    optimizer.resample(0)
    train_step(net, optimizer)
    net(toy_batches()[0][0]).sum().backward()  # accumulates on top of applied gradients
    with pytest.raises(RuntimeError, match="gradients wait"):
        optimizer.resample(1)
    optimizer.zero_grad()
    optimizer.resample(1)


def test_step_without_resample_is_an_error():
    net, _, optimizer = planned()
    with pytest.raises(RuntimeError, match="resample"):
        train_step(net, optimizer)


def test_state_resumes_bit_for_bit():
    net, _, optimizer = planned(weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    batches = toy_batches(3)
    for epoch in range(2):
        optimizer.resample(epoch)
        train_step(net, optimizer, batches[epoch])
        scheduler.step()
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "opt": optimizer.state_dict(), "lr": scheduler.state_dict()}, file)
    for _ in range(2):
        train_step(net, optimizer, batches[2])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, _, resumed = planned(weight_decay=0.1)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["opt"])
    torch.optim.lr_scheduler.CosineAnnealingLR(resumed, 10).load_state_dict(saved["lr"])
    assert resumed.epoch == 1
    for _ in range(2):
        train_step(other, resumed, batches[2])
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_a_state_of_another_plan_or_of_other_groups_is_refused_and_nothing_changes():
    _, _, optimizer = planned()
    optimizer.resample(2)
    _, _, other = planned(seed=5)
    with pytest.raises(ValueError, match="belongs to plan"):
        other.load_state_dict(optimizer.state_dict())
    assert other.epoch is None
    net, _, _ = planned()
    apart = TraDyOptimizer([{"params": net.head.weight}, {"params": net.head.bias}])
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters trained whole, this optimizer of \[1, 1\]"):
        apart.load_state_dict(optimizer.state_dict())
    assert apart.epoch is None


def test_schedulers_drive_all_groups_and_closures_are_called_once():
    net, plan, _ = planned()
    groups = [
        {"params": net.head.parameters(), "lr": 0.01},
        {"params": [net.get_submodule(n).weight for n in plan.pool]},
    ]
    optimizer = TraDyOptimizer(groups, plan, lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.05]
    optimizer.resample(0)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(toy_batches()[0][0]), toy_batches()[0][1])
        loss.backward()
        return loss

    before = weights(net)
    assert optimizer.step(closure) > 0
    assert calls == [1]
    assert not torch.equal(before["head.weight"], net.head.weight)
    assert any(not torch.equal(before[f"{name}.weight"], net.get_submodule(name).weight) for name in plan.pool)


def test_named_parameters_and_tensor_learning_rates_are_accepted():
    net, plan, plain = planned(lr=0.1)
    twin = toy_net()
    apply_plan(twin, plan)
    named = TraDyOptimizer(twin.named_parameters(), plan, lr=torch.tensor(0.1))
    for model, optimizer in ((net, plain), (twin, named)):
        optimizer.resample(0)
        train_step(model, optimizer)
    assert len(named.param_groups[0]["param_names"]) == len(named.param_groups[0]["params"])
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], tensor, rtol=1e-6, atol=1e-8)


def test_grad_scaler_unscales_once_and_skips_a_step_that_overflowed():
    net, _, optimizer = planned()
    twin, _, plain = planned()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = toy_batches()[0]
    for model, opt in ((net, optimizer), (twin, plain)):
        opt.resample(0)
        loss = F.cross_entropy(model(x), y)
        (scaler.scale(loss) if opt is optimizer else loss).backward()
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-10, atol=1e-12)
    before = weights(net)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(net(x), y) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert scaler.get_scale() < 1024.0
    optimizer.resample(1)  # the skipped gradients are spent


def test_models_without_the_plan_are_refused():
    net = toy_net()
    plan = toy_plan(net)
    with pytest.raises(ValueError, match=r"5 of the plan's 5 layers.*apply_plan"):
        TraDyOptimizer(net.parameters(), plan)
    apply_plan(net, plan)
    with pytest.raises(ValueError, match=r"5 of the plan's 5 layers.*'depthwise'"):
        TraDyOptimizer([net.norm.weight], plan)
    with pytest.raises(ValueError, match="was applied to the model"):
        TraDyOptimizer(net.parameters(), toy_plan(toy_net(), seed=9))
    with pytest.raises(ValueError, match="deepcopy"):
        TraDyOptimizer(copy.deepcopy(net).parameters(), plan)
    with pytest.raises(TypeError, match="dict"):
        TraDyOptimizer(net.parameters(), {})
    with pytest.raises(TypeError, match=r"NoneType.*lead to none"):
        TraDyOptimizer(toy_net().parameters())
    with pytest.raises(TypeError, match="params is a Tensor"):
        TraDyOptimizer(net.head.weight, plan)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_optimizer_is_not_copied_but_its_state_goes_on_in_a_copied_model(copied):
    net = toy_net()
    plan = toy_plan(net)
    optimizer = TraDyOptimizer(apply_plan(net, plan).parameters(), plan, lr=0.1, momentum=0.9)
    optimizer.resample(2)
    train_step(net, optimizer)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copied(optimizer)
    twin = copy.deepcopy(net)
    other = TraDyOptimizer(apply_plan(remove_plan(twin), plan).parameters(), plan, lr=0.1, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    for model, opt in ((net, optimizer), (twin, other)):
        train_step(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    "lose",
    [
        remove_plan,
        lambda net: apply_plan(remove_plan(net), toy_plan(toy_net())),
        lambda net: net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True),
    ],
    ids=["removed", "applied again", "replaced"],
)
def test_a_model_that_would_be_trained_no_more_is_refused_at_the_next_draw(lose):
    net, _, optimizer = planned()
    optimizer.resample(0)
    train_step(net, optimizer)
    optimizer.zero_grad()
    lose(net)
    with pytest.raises(RuntimeError, match=r"the plan was removed, or the weight replaced.*assign=True"):
        optimizer.resample(1)
    assert optimizer.epoch == 0


def test_two_models_of_one_plan_need_an_optimizer_each():
    (net, plan, _), (other, _, optimizer) = planned(), planned()
    parameters = [*net.parameters(), *other.parameters()]
    with pytest.raises(ValueError, match="of a second planned model"):
        TraDyOptimizer(parameters, plan)
    with pytest.raises(ValueError, match="of a second planned model"):
        optimizer.add_param_group({"params": net.parameters()})
    assert len(optimizer.param_groups) == 1


def test_the_plan_is_found_from_the_parameters():
    net, plan, _ = planned()
    assert TraDyOptimizer(net.parameters()).plan is plan
    assert TraDyOptimizer([net.head.bias]).plan is plan


@pytest.mark.parametrize("named", [False, True])
def test_frozen_weights_that_a_loop_left_out_join_the_group_of_the_largest_decay(named):
    net, plan, plain = planned(weight_decay=0.1)
    twin = toy_net()
    apply_plan(twin, plan)
    trained = [item for item in twin.named_parameters() if item[1].requires_grad]
    assert {name for name, _ in trained} == {"head.weight", "head.bias"}
    groups = [
        {"params": [item] if named else item[1], "weight_decay": decay}
        for item, decay in zip(reversed(trained), (0.0, 0.1), strict=True)
    ]
    optimizer = TraDyOptimizer(groups, lr=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1 + len(plan.pool)]
    assert not named or all(len(group["param_names"]) == len(group["params"]) for group in optimizer.param_groups)
    groups = [{"params": [net.head.bias], "weight_decay": 0.0}, {"params": [net.head.weight]}]
    groups[1]["params"] += [net.get_submodule(layer).weight for layer in plan.pool]
    plain = TraDyOptimizer(groups, plan, lr=0.1, weight_decay=0.1)
    for model, opt in ((net, plain), (twin, optimizer)):
        for epoch in range(2):
            opt.resample(epoch)
            train_step(model, opt)
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in twin.state_dict().items())


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"lr": float("nan")}, {"lr": True}, {"weight_decay": -0.1}], ids=str)
def test_numbers_out_of_range_are_named(wrong):
    net = toy_net()
    plan = toy_plan(net)
    apply_plan(net, plan)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TraDyOptimizer(net.parameters(), plan, **wrong)


def test_a_first_group_of_frozen_parameters_alone_has_no_say_in_the_device():
    net = toy_net()
    plan = toy_plan(net)
    apply_plan(net, plan)
    groups = [{"params": net.norm.parameters()}, {"params": net.head.parameters(), "weight_decay": 0.1}]
    optimizer = TraDyOptimizer(groups, plan)
    assert optimizer.param_groups[0]["params"] == []
    assert optimizer.join_device == net.head.weight.device


def test_gradients_that_model_zero_grad_leaves_are_told_of():
    net, _, optimizer = planned()
    optimizer.resample(0)
    x, y = toy_batches()[0]
    leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for clear in (
            lambda: None,
            optimizer.zero_grad,
            lambda: optimizer.zero_grad(set_to_none=False),
            lambda: [setattr(leaf, "grad", None) for leaf in leaves],
            lambda: [leaf.grad.zero_() for leaf in leaves if leaf.grad is not None],
        ):
            clear()
            for _ in range(2):
                F.cross_entropy(net(x), y).backward()
            optimizer.step()
    net.zero_grad()
    with pytest.warns(UserWarning, match=r"the last step has used: model\.zero_grad\(\) does not see") as told:
        F.cross_entropy(net(x), y).backward()
    assert {warning.filename for warning in told} == {__file__}
