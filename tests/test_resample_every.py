"""Channels drawn anew by step(): after every n steps, never inside an accumulation window, resumed exactly."""

import io

import pytest
import torch
import torch.nn.functional as F
from test_optimizer import train_step
from toys import toy_batches, toy_net, toy_plan

from trady_triton import TraDyOptimizer, apply_plan, measure


def planned(every, dtype=torch.float64, **options):
    net = toy_net(dtype)
    plan = toy_plan(net, 1200)
    apply_plan(net, plan)
    return net, plan, TraDyOptimizer(net.parameters(), plan, lr=0.1, resample_every=every, **options)


def drawn(optimizer):
    return {slot.layer: tuple(slot.channels.tolist()) for slot in optimizer._all_slots() if len(slot.channels)}


@pytest.mark.parametrize("every", [1, 3])
def test_every_n_steps_have_their_own_draw(every):
    net, plan, optimizer = planned(every)
    for step in range(7):
        assert drawn(optimizer) == dict(plan.sample(step // every))
        assert optimizer.epoch == step // every
        train_step(net, optimizer)


def test_accumulation_windows_are_whole():
    net, plan, optimizer = planned(2)
    x, y = toy_batches(size=6)[0]
    for step in range(5):
        optimizer.zero_grad()
        for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
            assert drawn(optimizer) == dict(plan.sample(step // 2))
            (F.cross_entropy(net(x[part]), y[part]) / 3).backward()
        optimizer.step()


def test_skipped_steps_and_steps_at_learning_rate_zero_do_not_count():
    net, _, optimizer = planned(1)
    scaler = torch.amp.GradScaler("cpu")
    x, y = toy_batches()[0]
    scaler.scale(F.cross_entropy(net(x), y) * float("inf")).backward()
    scaler.step(optimizer)
    assert optimizer.epoch == 0
    optimizer.param_groups[0]["lr"] = 0.0
    train_step(net, optimizer)
    assert optimizer.epoch == 0
    optimizer.param_groups[0]["lr"] = 0.1
    train_step(net, optimizer)
    assert optimizer.epoch == 1
    optimizer.zero_grad()
    measure(net, optimizer, x, y)
    assert optimizer.epoch == 1
    net = toy_net()
    plan = toy_plan(net, 1200)
    apply_plan(net, plan)
    groups = [{"params": net.head.parameters(), "lr": 0.0}, {"params": [net.stem.weight], "lr": 1.0}]
    optimizer = TraDyOptimizer(groups, resample_every=1)
    train_step(net, optimizer)
    assert optimizer.epoch == 1  # a group of learning rate 0 beside another one


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"algorithm": "adamw"}], ids=["sgd", "momentum", "adamw"])
def test_resume_between_two_draws_is_exact(options):
    net, _, optimizer = planned(3, **options)
    batches = toy_batches(8)
    for batch in batches[:4]:
        train_step(net, optimizer, batch)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, _, resumed = planned(3, **options)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for batch in batches[4:]:
        for model, opt in ((net, optimizer), (other, resumed)):
            train_step(model, opt, batch)
        assert drawn(optimizer) == drawn(resumed)
    assert optimizer.epoch == 2
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in other.state_dict().items())
    _, _, other_pace = planned(2, **options)
    with pytest.raises(ValueError, match="drawn anew every"):
        other_pace.load_state_dict(saved[1])


def test_a_step_that_would_draw_while_a_forward_waits_changes_nothing():
    net, _, optimizer = planned(2)
    x, y = toy_batches()[0]
    waiting = net(x).sum()
    train_step(net, optimizer)  # draws nothing
    del waiting
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    waiting = net(x).sum()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="waits for its backward"):
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    del waiting
    optimizer.step()
    assert optimizer.epoch == 1


def test_resample_without_an_epoch_follows_a_model_that_moved():
    net, plan, optimizer = planned(2, torch.float32)
    train_step(net, optimizer, toy_batches(dtype=torch.float32)[0])
    net.double()
    optimizer.zero_grad()
    assert optimizer.resample() == plan.sample(0)
    train_step(net, optimizer)
    assert optimizer.epoch == 1
    with pytest.raises(ValueError, match="drawn by step"):
        optimizer.resample(1)


@pytest.mark.parametrize("wrong", [0, -2, True, 1.5, "step"])
def test_a_wrong_pace_is_named(wrong):
    with pytest.raises(ValueError, match="resample_every"):
        planned(wrong)
