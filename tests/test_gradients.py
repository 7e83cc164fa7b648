"""Between backward and step: mixed precision, GradScaler, accumulation, clipping by the loop and by the optimizer."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_optimizer import drawn_mask, train_step, weights
from torch import nn
from torch.nn.utils import clip_grad_norm_
from toys import toy_batches, toy_net, toy_plan

from trady_triton import TraDyOptimizer, apply_plan
from trady_triton.functional import ConvGeometry, lean_conv2d, lean_linear
from trady_triton.slot import ChannelSlot

HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


def planned(dtype=torch.float64, lr=0.1, budget=1200, **options):
    net = toy_net(dtype)
    plan = toy_plan(net, budget)
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr, **options)
    optimizer.resample(0)
    return net, optimizer


def members(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients(optimizer):
    return [p.grad.clone() for p in members(optimizer) if p.grad is not None]


def assert_equal_weights(net, other, **bounds):
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], **bounds)


EXACT = {"rtol": 1e-11, "atol": 1e-13}


@HALF
@pytest.mark.parametrize("kind", ["linear", "pointwise", "spatial", "depthwise"])
def test_dw_under_autocast_is_summed_in_fp32(half, kind):
    """Against float64 sums of the same half-precision operands: far below the rounding of a half-precision result."""
    generator = torch.Generator().manual_seed(0)
    if kind == "linear":
        weight, x, dy = torch.randn(24, 16), torch.randn(512, 16, generator=generator), torch.ones(512, 24)
        groups, geometry = 1, None
    else:
        kernel, groups = (1 if kind == "pointwise" else 3), (16 if kind == "depthwise" else 1)
        weight = torch.randn(16, 16 // groups, kernel, kernel)
        x = torch.randn(4, 16, 12, 12, generator=generator)
        geometry = ConvGeometry(padding=(kernel // 2, kernel // 2), groups=groups)
        dy = torch.ones(4, 16, 12, 12)
    dy = torch.rand(dy.shape, generator=generator).to(half)
    slot = ChannelSlot("layer", nn.Parameter(weight, requires_grad=False), groups, "plan")
    slot.set(range(16))
    with torch.autocast("cpu", half):
        y = (
            lean_linear(x, slot.weight, None, slot)
            if geometry is None
            else lean_conv2d(x, slot.weight, None, slot, geometry)
        )
    assert y.dtype == half
    y.backward(dy)
    exact = nn.Parameter(weight.double())
    seen = x.to(half).double()
    padding = 0 if geometry is None else geometry.padding
    (F.linear(seen, exact) if geometry is None else F.conv2d(seen, exact, padding=padding, groups=groups)).backward(
        dy.double()
    )
    expected = slot_part(slot, exact.grad)
    error = (slot.proxy.grad.double() - expected).abs().max() / expected.abs().max()
    rounding = (expected.to(half).double() - expected).abs().max() / expected.abs().max()
    assert slot.proxy.grad.dtype == torch.float32
    assert error < 1e-5 < rounding / 10


def slot_part(slot, dense):
    """The compact form of a dense gradient."""
    twin = ChannelSlot("twin", nn.Parameter(dense, requires_grad=False), slot.groups, "plan")
    twin.set(slot.channels.tolist())
    return twin.gather()


@HALF
def test_autocast_trains_float32_weights_like_dense_autocast(half):
    net, optimizer = planned(torch.float32)
    dense = toy_net(torch.float32)
    channels = optimizer.plan.sample(0)
    x, y = toy_batches(dtype=torch.float32)[0]
    for model in (net, dense):
        with torch.autocast("cpu", half):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
    for slot in optimizer._all_slots():
        if slot.proxy.grad is not None:
            reference = dense.get_submodule(slot.layer).weight.grad[drawn_mask(dense, slot.layer, channels[slot.layer])]
            assert slot.proxy.grad.dtype == torch.float32
            torch.testing.assert_close(slot.proxy.grad.norm(), reference.norm(), rtol=3e-2, atol=1e-4)
    optimizer.step()
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("options", [{}, {"algorithm": "adamw"}], ids=["sgd", "adamw"])
def test_a_grad_scaler_unscales_once(explicit, parts, options):
    net, optimizer = planned(**options, weight_decay=0.1)
    twin, plain = planned(**options, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = toy_batches(size=6)[0]
    for part in range(parts):
        piece = slice(part, None, parts)
        scaler.scale(F.cross_entropy(net(x[piece]), y[piece]) / parts).backward()
        (F.cross_entropy(twin(x[piece]), y[piece]) / parts).backward()
    if explicit:
        scaler.unscale_(optimizer)
        for ours, wanted in zip(gradients(optimizer), gradients(plain), strict=True):
            torch.testing.assert_close(ours, wanted, **EXACT)
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    assert_equal_weights(net, twin, **EXACT)
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize("explicit", [False, True])
def test_infinities_in_compact_gradients_alone_skip_the_step_and_change_nothing(explicit):
    net, optimizer = planned(algorithm="adamw")
    train_step(net, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before, state = weights(net), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    x, y = toy_batches()[0]
    proxy = next(slot.proxy for slot in optimizer._all_slots() if len(slot.channels))
    proxy.register_hook(lambda grad: grad * float("inf"))
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    assert all(p.grad.isfinite().all() for p in net.head.parameters())
    if explicit:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    after = optimizer.state_dict()["param_groups"][0]
    for name, entry in state["param_groups"][0]["trady_state"].items():
        assert all(torch.equal(value, after["trady_state"][name][key]) for key, value in entry.items())
    assert after["trady_steps"] == state["param_groups"][0]["trady_steps"] == 1


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"algorithm": "adamw"}], ids=["sgd", "momentum", "adamw"])
def test_micro_batches_equal_one_batch_also_in_a_last_shorter_window(options):
    net, optimizer = planned(**options)
    twin, plain = planned(**options)
    for size in (6, 6, 5):  # windows of three micro-batches, the last of three unequal ones
        x, y = toy_batches(size=size)[0]
        for part in (slice(0, 2), slice(2, 4), slice(4, size)):
            (F.cross_entropy(net(x[part]), y[part], reduction="sum") / size).backward()
        optimizer.step()
        optimizer.zero_grad()
        train_step(twin, plain, (x, y))
    assert_equal_weights(net, twin, rtol=1e-10, atol=1e-12)


def backward(net):
    x, y = toy_batches()[0]
    F.cross_entropy(net(x), y).backward()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_max_grad_norm_clips_the_joint_norm_of_unscaled_gradients(parts, scaled, explicit):
    net, optimizer = planned(max_grad_norm=0.05)
    twin, plain = planned()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
    for _ in range(parts):
        x, y = toy_batches()[0]
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        F.cross_entropy(twin(x), y).backward()
    if explicit:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert clip_grad_norm_(members(plain), 0.05) > 0.06
    plain.step()
    assert_equal_weights(net, twin, rtol=1e-9, atol=1e-11)


def test_gradients_within_the_norm_stay_as_they_are():
    net, optimizer = planned(max_grad_norm=1e6)
    twin, plain = planned()
    for model, opt in ((net, optimizer), (twin, plain)):
        train_step(model, opt)
    assert_equal_weights(net, twin, rtol=0, atol=0)


def test_an_infinite_norm_leaves_gradients_alone_also_where_theirs_overflows():
    _, optimizer = planned(torch.float32, max_grad_norm=math.inf)
    for parameter in members(optimizer):
        parameter.grad = torch.full_like(parameter, 1e30)
    optimizer.step()
    assert all((grad == 1e30).all() for grad in gradients(optimizer))


def test_clipping_over_the_models_parameters_is_told_once():
    net, optimizer = planned()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
        backward(net)
        clip_grad_norm_(members(optimizer), 0.05)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(F.cross_entropy(net(toy_batches()[0][0]), toy_batches()[0][1])).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        optimizer.zero_grad()
    backward(net)
    clip_grad_norm_(net.parameters(), 0.05)
    with pytest.warns(UserWarning, match="max_grad_norm") as told:
        optimizer.step()
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.zero_grad()
        backward(net)
        clip_grad_norm_(net.parameters(), 0.05)
        optimizer.step()


def test_gradients_that_a_loop_replaces_count_as_changed():
    net, optimizer = planned()
    backward(net)
    for parameter in net.head.parameters():
        parameter.grad = 0.5 * parameter.grad
    with pytest.warns(UserWarning, match="changed after the backward"):
        optimizer.step()


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), "1"])
def test_a_norm_out_of_range_is_named(wrong):
    with pytest.raises(ValueError, match="max_grad_norm"):
        planned(max_grad_norm=wrong)


def test_gradients_that_are_cleared_in_place_do_not_wait_for_a_step():
    net, optimizer = planned()
    backward(net)
    with pytest.raises(RuntimeError, match="gradients wait for step"):
        optimizer.resample(1)
    optimizer.zero_grad(set_to_none=False)
    optimizer.resample(1)
    assert optimizer.epoch == 1


def test_gradients_that_are_cleared_in_place_are_clipped_like_others():
    """The bias of the head has a gradient of zeros in the second step, which no backward adds to."""
    results = []
    for set_to_none in (True, False):
        net, optimizer = planned(max_grad_norm=0.05)
        backward(net)
        optimizer.step()
        optimizer.zero_grad(set_to_none)
        net.head.bias.requires_grad_(False)
        backward(net)
        optimizer.step()
        results.append(net)
    assert_equal_weights(*results, **EXACT)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_scaled_step_that_was_refused_leaves_no_scale_behind(explicit):
    (net, _), (twin, _) = planned(), planned()
    optimizer, plain = (TraDyOptimizer(model.parameters(), lr=0.1, resample_every=1) for model in (net, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = toy_batches()[0]
    waits = net(x)
    for tries in range(2):
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        if explicit:
            scaler.unscale_(optimizer)
        if tries == 0:
            with pytest.raises(RuntimeError, match="a forward waits"):
                scaler.step(optimizer)
            del waits
            optimizer.zero_grad()
        else:
            scaler.step(optimizer)
        scaler.update()
    backward(twin)
    plain.step()
    assert_equal_weights(net, twin, **EXACT)


@pytest.mark.filterwarnings("error")
def test_unscaling_gradients_of_several_dtypes_is_not_taken_for_clipping():
    net, optimizer = planned(torch.float16)
    net.head.float().register_forward_pre_hook(lambda module, args: args[0].float())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    x, y = toy_batches(dtype=torch.float16)[0]
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    scaled = gradients(optimizer)
    scaler.step(optimizer)
    for before, after in zip(scaled, gradients(optimizer), strict=True):
        assert torch.equal(after, (before.double() / 64.0).to(before.dtype))
