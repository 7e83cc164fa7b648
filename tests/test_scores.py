"""Scores between draws: what the optimizer sees, what probes measure, and that a resumed run draws the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_optimizer import drawn_mask
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import toy_batches, toy_net, toy_plan

from trady_triton import TraDyOptimizer, apply_plan
from trady_triton.meters import FlopsByKind
from trady_triton.probes import NeuronVelocity, fisher_scores, gradient_scores
from trady_triton.ranking import channel_norms


def planned(sampler: str, budget: int | None = 400, **options):
    net = toy_net()
    plan = toy_plan(net, budget, coverage=None, sampler=sampler, **options)
    dense = copy.deepcopy(net)
    apply_plan(net, plan)
    return net, dense, TraDyOptimizer(net.parameters(), plan, lr=0.05)


def train(net, optimizer, steps=2, seed=0):
    for x, y in toy_batches(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x + seed), y).backward()
        optimizer.step()


def groups_of(layer):
    return getattr(layer, "groups", 1)


def dense_gradients(dense, plan, batches):
    dense.zero_grad()
    for x, y in batches:
        F.cross_entropy(dense(x), y).backward()
    return {name: dense.get_submodule(name).weight.grad for name in plan.pool}


def test_seen_norms_are_the_root_mean_square_of_the_steps():
    net, dense, optimizer = planned("medyate")
    drawn = optimizer.resample(0)
    optimizer.param_groups[0]["lr"] = 0.0
    train(net, optimizer, steps=2)
    squares = [
        {name: channel_norms(grad, groups_of(dense.get_submodule(name))).square()
         for name, grad in dense_gradients(dense, optimizer.plan, [batch]).items()}
        for batch in toy_batches(2)
    ]  # fmt: skip
    norms = {name: ((squares[0][name] + squares[1][name]) / 2).sqrt() for name in squares[0]}
    assert optimizer.resample(0) == drawn  # what was seen since is for the next draw
    optimizer.resample(1)
    kept = optimizer._scores.kept
    best = max(float(kept[name].max()) for name in kept)
    for name in optimizer.plan.pool:
        ids = list(drawn[name])
        torch.testing.assert_close(kept[name][ids], norms[name][ids].double(), rtol=1e-5, atol=0)
        others = [c for c in range(len(norms[name])) if c not in ids]
        assert kept[name][others].tolist() == [best] * len(others)  # optimism


def test_norms_of_channels_that_are_not_drawn_stay():
    net, _, optimizer = planned("weighted")
    optimizer.resample(0)
    train(net, optimizer)
    second = optimizer.resample(1)
    before = {name: values.clone() for name, values in optimizer._scores.kept.items()}
    train(net, optimizer, seed=1)
    optimizer.resample(2)
    for name, values in optimizer._scores.kept.items():
        changed = set(torch.nonzero(values != before[name]).flatten().tolist())
        assert changed == set(second[name]), name
    kept = optimizer._scores.kept
    optimizer.resample(3)
    assert optimizer._scores.kept is kept  # nothing was seen since


def test_norms_of_half_precision_gradients_do_not_overflow():
    net, _, optimizer = planned("medyate")
    net.half()
    drawn = optimizer.resample(0)
    for name in drawn:
        slot = net.get_submodule(name).slot
        slot.proxy.grad = torch.full_like(slot.proxy, 300.0)
    optimizer._scores.see(optimizer._all_slots())
    optimizer.zero_grad()
    optimizer.resample(1)
    assert all(optimizer._scores.kept[name].isfinite().all() for name in drawn)


@pytest.mark.parametrize(("sampler", "epochs"), [("medyate", 1), ("medyate", 2), ("weighted", 2)])
def test_a_resumed_run_draws_and_trains_bit_for_bit_the_same(sampler, epochs, tmp_path):
    net, _, optimizer = planned(sampler)
    for epoch in range(epochs):
        optimizer.resample(epoch)
        train(net, optimizer, steps=1)
    torch.save([net.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    again, _, resumed = planned(sampler)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for model, own in ((net, optimizer), (again, resumed)):
        train(model, own, seed=3)
        own.resample(epochs)
        train(model, own, seed=4)
    assert optimizer.resample(epochs) == resumed.resample(epochs)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_samplers_without_scores_keep_nothing():
    net, _, optimizer = planned("trady")
    optimizer.resample(0)
    train(net, optimizer)
    assert "trady_scores" not in optimizer.state_dict()["param_groups"][0]


def test_sparse_update_goes_by_the_pretrained_weights_for_good():
    net, dense, optimizer = planned("su", None, layers={"pointwise": 0.5, "grouped": 0.25})
    first = optimizer.resample(0)
    norms = {name: channel_norms(dense.get_submodule(name).weight, groups_of(dense.get_submodule(name)))
             for name in first}  # fmt: skip
    assert first == {name: tuple(sorted(norms[name].topk(len(ids)).indices.tolist())) for name, ids in first.items()}
    with torch.no_grad():
        net.pointwise.weight.mul_(torch.rand(1, 12, 1, 1) * 9)
    assert optimizer.resample(1) == first


def test_an_oracle_needs_its_scores():
    _, _, optimizer = planned("d-rgn")
    with pytest.raises(ValueError, match="gradient_scores"):
        optimizer.resample(0)
    assert optimizer.epoch is None
    optimizer.resample(0, {name: torch.ones(shape.in_channels) for name, shape in optimizer.plan.shapes.items()})
    with pytest.raises(ValueError, match="gradient_scores"):
        optimizer.resample(1)


def test_gradient_scores_are_the_dense_gradient_norms_and_leave_no_trace():
    net, dense, optimizer = planned("s-rgn")
    batches = toy_batches(3)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    scores = gradient_scores(net, batches, F.cross_entropy)
    for name, grad in dense_gradients(dense, optimizer.plan, batches).items():
        wanted = channel_norms(grad, groups_of(dense.get_submodule(name)))
        torch.testing.assert_close(scores[name], wanted.double(), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in before.items())
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    first = optimizer.resample(0, scores)
    optimizer.zero_grad()
    train(net, optimizer)
    assert optimizer.resample(1) == first  # static: no second pass
    with pytest.raises(ValueError, match="empty"):
        gradient_scores(net, [], F.cross_entropy)
    with pytest.raises(ValueError, match="the model has no plan"):
        gradient_scores(dense, batches, F.cross_entropy)


def test_gradients_that_wait_are_not_mixed_up_with_those_of_a_probe():
    net, _, optimizer = planned("trady")
    optimizer.resample(0)
    F.cross_entropy(net(toy_batches(1)[0][0]), toy_batches(1)[0][1]).backward()
    with pytest.raises(RuntimeError, match=r"gradients wait for step\(\)"):
        gradient_scores(net, toy_batches(1), F.cross_entropy)
    optimizer.step()
    assert gradient_scores(net, toy_batches(1), F.cross_entropy).keys() == set(optimizer.plan.pool)


def test_kept_scores_live_on_the_cpu_wherever_a_state_was_loaded_to():
    _, _, optimizer = planned("medyate")
    optimizer.resample(0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        kept = {name: torch.ones(shape.in_channels, device="cuda") for name, shape in optimizer.plan.shapes.items()}
        optimizer._scores.load({"kept": kept}, [])
    assert {values.device.type for values in optimizer._scores.kept.values()} == {"cpu"}


def test_fisher_scores_are_activation_times_gradient_of_each_sample():
    net, dense, optimizer = planned("tinytrain")
    ((x, y),) = toy_batches(1)
    scores = fisher_scores(net, [(x, y)], F.cross_entropy)
    inputs = {}
    for name in optimizer.plan.pool:
        dense.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: inputs.__setitem__(n, args[0]))
    for name in optimizer.plan.pool:
        total = 0
        for i in range(len(y)):
            loss = F.cross_entropy(dense(x[i : i + 1].clone().requires_grad_()), y[i : i + 1])
            product = inputs[name] * torch.autograd.grad(loss, inputs[name])[0]
            by_channel = product.sum(1) if name == "tokens" else product.sum((2, 3))
            total = total + by_channel[0].square()
        torch.testing.assert_close(scores[name], total / (2 * len(y)), rtol=1e-9, atol=1e-15)
    assert optimizer.resample(0, scores)


def test_velocity_follows_the_published_recursion():
    net, _, optimizer = planned("neq", None)
    meter, batches = NeuronVelocity(net, mu=0.5), toy_batches(1)
    assert meter.update(batches) is None
    optimizer.resample(0)
    train(net, optimizer)
    first = meter.update(batches)
    delta = {name: -values for name, values in first.items()}  # v_1 = 0 + (0 - delta_1)
    assert all((values >= -1e-6).all() for values in delta.values())
    assert max(float(values.max()) for values in delta.values()) > 0
    second = meter.update(batches)  # nothing moved: delta_2 = 0, dphi_2 = delta_1, dphi_1 = -delta_1
    for name, values in second.items():
        wanted = 0.5 * first[name] + delta[name] - (-delta[name])  # mu v_1 + dphi_2 - dphi_1
        torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-7)


def test_responses_are_those_before_an_operation_in_place():
    net, _, _ = planned("neq", None)
    net.float().tokens.register_forward_pre_hook(lambda module, args: args[0].zero_())  # a view of pointwise's output
    meter = NeuronVelocity(net)
    meter.update(toy_batches(1, dtype=torch.float32))
    assert meter._maps["pointwise"].any()


def test_only_the_chosen_neurons_are_updated():
    net, dense, optimizer = planned("velocity", 40)
    drawn = optimizer.resample(0)
    train(net, optimizer, steps=1)
    assert drawn.outputs
    for name in optimizer.plan.pool:
        moved = (net.get_submodule(name).weight != dense.get_submodule(name).weight).flatten(1).any(1)
        assert torch.nonzero(moved).flatten().tolist() == list(drawn.outputs.get(name, ())), name


def test_a_scale_multiplies_the_update_of_its_channels():
    net, dense, optimizer = planned("trady", 400, dgrad_budget=0.9, correction_cap=3.0)
    drawn = optimizer.resample(1)
    ((x, y),) = toy_batches(1)
    train(net, optimizer, steps=1)
    grads = dense_gradients(dense, optimizer.plan, [(x, y)])
    for name, ids in drawn.items():
        layer, slot = dense.get_submodule(name), net.get_submodule(name).slot
        mask = drawn_mask(dense, name, ids)
        moved = (net.get_submodule(name).weight - layer.weight).detach()
        assert (moved[~mask] == 0).all()
        ratio = moved[mask] / (-0.05 * grads[name][mask])
        scale = sorted(round(float(value), 6) for value in drawn.scale[name])
        assert {round(float(value), 5) for value in ratio} <= {round(value, 5) for value in scale}, slot.layer


def test_backward_stops_at_the_drawn_depth():
    net, _, optimizer = planned("trady", 400, dgrad_budget=0.5)
    ((x, y),) = toy_batches(1)
    head = 2 * 9 * 5 * len(y)  # dX of the head, which no plan counts
    depths = set()
    for epoch in range(12):
        drawn = optimizer.resample(epoch)
        lowest = next(name for name in optimizer.plan.shapes if drawn[name])
        depths.add(lowest)
        with FlopsByKind(net) as flops:
            F.cross_entropy(net(x), y).backward()
        assert flops.dgrad_flops == len(y) * optimizer.plan.dgrad_flops_above(lowest) + head, lowest
        optimizer.zero_grad()
    assert len(depths) > 1
