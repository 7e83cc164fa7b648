"""Momentum and AdamW of the drawn channels: equal to torch.optim, carried or reset at a draw, saved, and counted."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from test_optimizer import drawn_mask, train_step
from toys import toy_batches, toy_net, toy_plan

from trady_triton import TraDyOptimizer, apply_plan, ledger, measure
from trady_triton.optim.states import state_shapes

KINDS = {
    "momentum": ({"momentum": 0.9}, torch.optim.SGD),
    "nesterov": ({"momentum": 0.8, "nesterov": True}, torch.optim.SGD),
    "adamw": ({"algorithm": "adamw", "betas": (0.8, 0.95), "eps": 1e-6}, torch.optim.AdamW),
}
OPTIMIZERS = pytest.mark.parametrize("kind", KINDS)


def planned(kind, budget=1200, lr=0.02, dtype=torch.float64, **options):
    net = toy_net(dtype)
    plan = toy_plan(net, budget)
    apply_plan(net, plan)
    return net, plan, TraDyOptimizer(net.parameters(), plan, lr, 0.05, **KINDS[kind][0], **options)


def reference_of(kind, parameters):
    options, make = KINDS[kind]
    return make(parameters, lr=0.02, weight_decay=0.05, **{k: v for k, v in options.items() if k != "algorithm"})


@OPTIMIZERS
def test_twenty_steps_on_every_channel_equal_torch_optim(kind):
    net, plan, optimizer = planned(kind, 10**7)
    dense = toy_net()
    trained = [p for n, p in dense.named_parameters() if n.removesuffix(".weight") in plan.pool or n.startswith("head")]
    reference = reference_of(kind, trained)
    optimizer.resample(0)
    for batch in toy_batches(20):
        train_step(net, optimizer, batch)
        train_step(dense, reference, batch)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, dense.state_dict()[name], rtol=1e-9, atol=1e-11)


class MaskedReference:
    """torch.optim on single channels: each has a parameter of its own, which starts anew when its state is dropped."""

    def __init__(self, kind, dense, policy):
        self.kind, self.dense, self.policy = kind, dense, policy
        self.head = reference_of(kind, dense.head.parameters())
        self.channels = {}

    def resample(self, channels):
        drawn = {(layer, c) for layer, ids in channels.items() for c in ids}
        kept = {key: value for key, value in self.channels.items() if key in drawn and self.policy == "carry"}
        self.channels = {key: kept.get(key) or self.one(*key) for key in sorted(drawn)}

    def one(self, layer, channel):
        mask = drawn_mask(self.dense, layer, [channel])
        parameter = torch.nn.Parameter(self.dense.get_submodule(layer).weight.detach()[mask])
        return parameter, mask, reference_of(self.kind, [parameter])

    def step(self, batch):
        self.dense.zero_grad()
        F.cross_entropy(self.dense(batch[0]), batch[1]).backward()
        self.head.step()
        for (layer, _), (parameter, mask, optimizer) in self.channels.items():
            weight = self.dense.get_submodule(layer).weight
            parameter.grad = weight.grad[mask]
            optimizer.step()
            weight.data[mask] = parameter.data


@OPTIMIZERS
@pytest.mark.parametrize("policy", ["carry", "reset"])
def test_every_draw_equals_torch_optim_on_single_channels(kind, policy):
    net, plan, optimizer = planned(kind, state_policy=policy)
    reference = MaskedReference(kind, toy_net(), policy)
    again = 0
    for epoch in range(4):
        before = set(reference.channels)
        optimizer.resample(epoch)
        reference.resample(plan.sample(epoch))
        again += len(before & set(reference.channels))
        for batch in toy_batches(epoch + 1):
            train_step(net, optimizer, batch)
            reference.step(batch)
    assert again > 3  # channels that were drawn twice running: the policies differ in them
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, reference.dense.state_dict()[name], rtol=1e-9, atol=1e-11)


@OPTIMIZERS
def test_state_is_compact_and_for_the_drawn_channels_alone(kind):
    net, plan, optimizer = planned(kind)
    for epoch in range(2):
        channels = optimizer.resample(epoch)
        train_step(net, optimizer)
    proxies = optimizer.param_groups[0]["params"][2:]
    assert len(proxies) == len(plan.pool)
    assert len(optimizer.state) == 2 + len(proxies)  # head and proxies: nothing of the first draw is left
    for layer, proxy in zip((slot.layer for slot in optimizer._all_slots()), proxies, strict=True):
        assert proxy.shape[0] == len(channels[layer])
        wanted = state_shapes(optimizer.algorithm, optimizer.param_groups[0], tuple(proxy.shape), True)
        assert {name: tuple(value.shape) for name, value in optimizer.state[proxy].items()} == wanted


@OPTIMIZERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_resumes_bit_for_bit_and_loads_as_weights_only(kind, dtype):
    net, _, optimizer = planned(kind, dtype=dtype)
    batches = [(x.to(dtype), y) for x, y in toy_batches(3)]
    for epoch in range(2):
        optimizer.resample(epoch)
        train_step(net, optimizer, batches[epoch])
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "opt": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    tensors = [t for s in saved["opt"]["param_groups"][0]["trady_state"].values() for t in s.values()]
    before = [tensor.clone() for tensor in tensors]
    assert tensors
    assert all(tensor.is_floating_point() for tensor in tensors)
    other, _, resumed = planned(kind, dtype=dtype)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["opt"])
    for model, opt in ((net, optimizer), (other, resumed)):
        for epoch in (1, 2):
            opt.resample(epoch)
            train_step(model, opt, batches[2])
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))  # what was loaded was copied


def test_a_state_that_does_not_fit_is_refused_and_nothing_changes():
    net, _, optimizer = planned("adamw")
    optimizer.resample(0)
    train_step(net, optimizer)
    good = optimizer.state_dict()
    _, _, other = planned("momentum")
    with pytest.raises(ValueError, match="another algorithm than 'sgd'"):
        other.load_state_dict(good)
    bad = optimizer.state_dict()
    layer = next(slot.layer for slot in optimizer._all_slots() if len(slot.channels))
    del bad["param_groups"][0]["trady_state"][layer]["exp_avg_sq"]
    _, _, fresh = planned("adamw")
    whole = optimizer.state_dict()
    del whole["param_groups"][0]["trady_state"]["1"]["exp_avg"]
    with pytest.raises(ValueError, match="state of 'parameter 1'"):
        fresh.load_state_dict(whole)
    with pytest.raises(ValueError, match=f"state of '{layer}'"):
        fresh.load_state_dict(bad)
    assert fresh.epoch is None
    fresh.load_state_dict(good)
    assert fresh.epoch == 0


def test_budgets_in_bytes_count_the_state():
    net = toy_net(torch.float32)
    ranking = toy_plan(net).shapes
    plans = {kind: toy_plan(net, "8KiB", optimizer=kind, batch_size=3) for kind in ("sgd", "momentum", "adamw")}
    for states, plan in enumerate(plans.values()):
        for shape in ranking.values():
            gradient, activation = plan.cost.gradient_cost(shape), plan.cost.activation_cost(shape)
            assert plan.cost.channel_cost(shape) == (1 + states) * gradient + activation
    apply_plan(net, plans["momentum"])
    TraDyOptimizer(net.parameters(), momentum=0.9)
    with pytest.raises(ValueError, match=r"adamw keeps 2 states.*counts 1.*optimizer='adamw'"):
        TraDyOptimizer(net.parameters(), algorithm="adamw")
    with pytest.raises(ValueError, match=r"optimizer 'lion': wanted one of sgd, momentum, adamw"):
        toy_plan(toy_net(), "8KiB", optimizer="lion")


@pytest.mark.parametrize(("kind", "options"), [("momentum", {"momentum": 0.9}), ("adamw", {"algorithm": "adamw"})])
def test_the_ledger_counts_the_state_and_no_draw_exceeds_its_budget(kind, options):
    net = toy_net(torch.float32)
    plan = toy_plan(net, "8KiB", optimizer=kind, batch_size=3)
    x, y = toy_batches(dtype=torch.float32)[0]
    predicted = ledger(net, plan, (3, 3, 12, 12))
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1, **options)
    channels = optimizer.resample(0)
    measured = measure(net, optimizer, x, y)
    assert predicted.state_bytes == measured.state_bytes
    assert predicted.peak_bytes == measured.peak_bytes
    of_channels = sum(
        value.nbytes
        for slot in optimizer._all_slots()
        for name, value in optimizer.state[slot.proxy].items()
        if name != "step"
    )
    assert of_channels == sum(len(ids) * plan.cost.state_cost(plan.shapes[layer]) for layer, ids in channels.items())
    head = sum(p.nbytes for p in net.head.parameters())
    steps = 4 * (2 + sum(map(len, channels.values()))) if kind == "adamw" else 0
    assert measured.state_bytes == of_channels + plan.cost.states * head + steps


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"algorithm": "lion"}, "algorithm 'lion': wanted one of sgd, adamw"),
        ({"state_policy": "keep"}, "state_policy 'keep': wanted one of carry, reset"),
        ({"average_at": "end"}, "average_at .end.: wanted one of step, backward"),
        ({"momentum": -0.1}, "momentum -0.1"),
        ({"nesterov": True}, "nesterov: wanted a momentum"),
        ({"algorithm": "adamw", "momentum": 0.9}, "AdamW has betas"),
        ({"algorithm": "adamw", "nesterov": True}, "AdamW has betas"),
        ({"algorithm": "adamw", "betas": (0.9, 1.0)}, "betas"),
        ({"algorithm": "adamw", "betas": (0.9, 0.9, 0.9)}, "betas"),
        ({"betas": (0.8, 0.9)}, "are of AdamW"),
        ({"eps": 1e-6}, "are of AdamW"),
        ({"lr": "0.1"}, "lr '0.1'"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options, match):
    net = toy_net()
    plan = toy_plan(net)
    apply_plan(net, plan)
    with pytest.raises(ValueError, match=match):
        TraDyOptimizer(net.parameters(), plan, **options)


@pytest.mark.parametrize("name", ["maximize", "dampening", "amsgrad", "differentiable", "betas"])
def test_options_of_torch_optim_that_are_none_here_are_not_passed_over(name):
    net = toy_net()
    plan = toy_plan(net)
    apply_plan(net, plan)
    with pytest.raises(ValueError, match=f"{name} .*algorithm 'sgd' has momentum and nesterov alone"):
        TraDyOptimizer([{"params": net.parameters(), name: (0.5, 0.5)}], plan)


def test_a_schedule_that_turns_momentum_on_equals_torch_sgd():
    """OneCycleLR does so by default."""
    net, plan, optimizer = planned("momentum", 10**7)
    optimizer = TraDyOptimizer(net.parameters(), plan, 0.02)
    dense = toy_net()
    reference = torch.optim.SGD(
        [p for n, p in dense.named_parameters() if n.removesuffix(".weight") in plan.pool or n.startswith("head")], 0.02
    )
    optimizer.resample(0)
    for model, opt in ((net, optimizer), (dense, reference)):
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10)
        for batch in toy_batches(8):
            train_step(model, opt, batch)
            schedule.step()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, dense.state_dict()[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("first", "then"), [(0.0, 0.9), (0.9, 0.0)])
def test_a_checkpoint_between_a_change_of_momentum_and_the_next_step_is_whole(first, then):
    results = []
    for is_resumed in (False, True):
        net, plan, optimizer = planned("momentum", 10**7)
        for momentum in (first, then, 0.9):
            for group in optimizer.param_groups:
                group["momentum"] = momentum
            if is_resumed and optimizer.epoch == 0:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = TraDyOptimizer(net.parameters(), plan)
                optimizer.load_state_dict(saved)
            optimizer.resample(0)
            train_step(net, optimizer)
        results.append(net.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_a_schedule_may_not_turn_on_what_the_budget_has_not_counted():
    net = toy_net()
    plan = toy_plan(net, "64KiB", dtype=torch.float64)
    optimizer = TraDyOptimizer(apply_plan(net, plan).parameters(), plan, 0.02)
    optimizer.resample(0)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match="momentum keeps 1 states"):
        train_step(net, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_states_follow_a_model_that_was_moved_after_the_optimizer_was_made(kind):
    net, _, optimizer = planned(kind, dtype=torch.float32, state_policy="reset")
    net.double()
    optimizer.resample(0)
    train_step(net, optimizer)
    before = states_of(optimizer)
    assert {value.dtype for name, value in before if name != "step"} == {torch.float64}
    net.float()
    optimizer.zero_grad()
    optimizer.resample(0)  # no new draw: nothing starts from zero
    for (name, value), (_, old) in zip(states_of(optimizer), before, strict=True):
        torch.testing.assert_close(value, old, check_dtype=False, msg=name)


def states_of(optimizer):
    return [item for state in optimizer.state.values() for item in state.items()]
