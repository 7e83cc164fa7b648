"""Plans whose drawn channels are stored in 8 or 4 bits: exact bytes, unbiased gradients, rounding that repeats."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from test_apply_plan import LAYERS, install, kept_bytes
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from toys import toy_batches, toy_net, toy_plan, toy_ranking

from trady_triton import Plan, Ranking, TraDyOptimizer, apply_plan, ledger, make_plan, rank_layers
from trady_triton.cost import CostModel
from trady_triton.ledger import measure
from trady_triton.meters import KeptBytes
from trady_triton.slot import find_slot

STORES = ("int8", "int4")


def planned(store, **options):
    """A toy network in float32 whose budget keeps all channels drawn, and its optimizer in epoch 0."""
    net = toy_net(torch.float32)
    plan = toy_plan(net, "10MiB", batch_size=3, store=store, **options)
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    optimizer.resample(0)
    return net, optimizer


def gradients(net, optimizer):
    x, y = toy_batches(dtype=torch.float32)[0]
    F.cross_entropy(net(x), y).backward()
    grads = {slot.layer: slot.proxy.grad.clone() for slot in slots(net)}
    optimizer.zero_grad()
    return grads


def slots(net):
    return [slot for parameter in net.parameters() if (slot := find_slot(parameter)) is not None]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("batch_size", [2, 31])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("count", [1, 4])
def test_bytes_kept_are_what_the_cost_says_to_the_byte(name, count, batch_size, store):
    layer, size = copy.deepcopy(LAYERS[name][0]), (batch_size, *LAYERS[name][1][1:])
    net = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(size, requires_grad=True)
    net(x)
    ranking = rank_layers(net, [(x.detach(), None)], lambda y, _: y.sum())
    plan = make_plan(ranking, budget="1MiB", batch_size=batch_size, store=store)
    apply_plan(net, plan)
    install(net, plan, {"0": range(count)})
    kept = kept_bytes(lambda: net[0](x), net.parameters())
    assert sum(kept) == count * plan.cost.activation_cost(plan.shapes["0"])


class Shared(nn.Module):
    """One Linear and one convolution, each called on two inputs of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(4, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        large, small = self.conv(x), self.conv(x[:, :, :5, :3])
        return self.head(sum(self.linear(y.flatten(2).mT).mean(1) for y in (large, small)))


@pytest.mark.parametrize("store", STORES)
def test_calls_of_different_sizes_are_each_charged_to_the_byte(store, tmp_path):
    torch.manual_seed(0)
    net, x, y = Shared(), torch.randn(3, 4, 9, 9), torch.tensor([0, 1, 2])
    rank_layers(net, [(x, y)], F.cross_entropy).save(tmp_path / "ranking.json")
    ranking = Ranking.load(tmp_path / "ranking.json")
    plan = make_plan(ranking, budget="1MiB", layers=["conv", "linear"], batch_size=3, store=store)
    apply_plan(net, plan)
    install(net, plan, {"conv": range(4), "linear": range(4)})
    with KeptBytes(net) as kept:
        loss = F.cross_entropy(net(x), y)
    del loss
    for name in ("conv", "linear"):
        assert kept.by_layer[name] == 4 * plan.cost.activation_cost(plan.shapes[name])


@pytest.mark.parametrize(
    ("name", "store"),
    [("resnet18", "int4"), ("mobilenetv2_035", "int8"), ("swin_tiny_patch4_window7_224", "int4")],
)
def test_a_network_keeps_no_more_than_its_budget_and_the_ledger_knows_it(name, store):
    small = {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)} if "swin" in name else {}
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=4, **small).eval()
    x, y = torch.randn(3, 3, 56, 56), torch.tensor([0, 1, 2])
    plan = make_plan(rank_layers(net, [(x, y)], F.cross_entropy), budget="64KiB", batch_size=3, store=store)
    predicted = ledger(net, plan, x.shape)
    drawn = plan.sample(0)
    assert len(drawn) > 1
    charged = sum(len(ids) * plan.cost.activation_cost(plan.shapes[layer]) for layer, ids in drawn.items())
    assert predicted.kept_by_kind["trained channels"] == charged
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan)
    optimizer.resample(0)
    assert measure(net, optimizer, x, y) == predicted
    assert optimizer.param_groups[0]["trady_steps"] == 0


def test_at_equal_bytes_more_channels_fit():
    ranking = toy_ranking(toy_net(torch.float32))
    plans = [make_plan(ranking, budget="24KiB", batch_size=16, store=store) for store in ("same", *STORES)]
    counts = [plan.expected(50).channels for plan in plans]
    assert counts[0] < counts[1] < counts[2]
    for plan in plans:
        assert all(plan.used(plan.sample(epoch)) <= plan.budget for epoch in range(50))


@pytest.mark.parametrize("store", STORES)
def test_gradients_are_bounded_and_unbiased_over_the_steps(store):
    exact = gradients(*planned("same"))
    net, optimizer = planned(store)
    seen = {name: [] for name in exact}
    for step in range(64):
        for slot in slots(net):
            slot.seed_step(step)
        for name, grad in gradients(net, optimizer).items():
            seen[name].append(grad)
    most = {"int8": 0.02, "int4": 0.3}[store]
    for name, grads in seen.items():
        error = torch.stack(grads).double() - exact[name].double()
        assert error.flatten(1).norm(dim=1).max() <= most * exact[name].norm(), name
        variance = error.square().mean(0).sum()
        assert error.mean(0).square().sum() <= 2 * variance / len(grads), f"{name}: the mean error is no chance"


@pytest.mark.parametrize("store", STORES)
def test_gradients_repeat_within_a_step_and_differ_between_steps(store):
    net, optimizer = planned(store)
    first = gradients(net, optimizer)
    assert all(torch.equal(grad, first[name]) for name, grad in gradients(net, optimizer).items())
    other, again = planned(store)
    assert all(torch.equal(grad, first[name]) for name, grad in gradients(other, again).items())
    for slot in slots(net):
        slot.seed_step(1)
    assert not any(torch.equal(grad, first[name]) for name, grad in gradients(net, optimizer).items())


def test_a_restored_optimizer_goes_on_with_the_noise_of_its_step():
    net, optimizer = planned("int4")
    for _ in range(2):
        F.cross_entropy(net(toy_batches(dtype=torch.float32)[0][0]), toy_batches()[0][1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    other, restored = planned("int4")
    other.load_state_dict(net.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = gradients(net, optimizer)
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(other, restored).items())


@pytest.mark.parametrize("store", STORES)
def test_recomputed_stores_are_bit_equal(store):
    net, optimizer = planned(store)
    expected = gradients(net, optimizer)
    checkpointed = copy.deepcopy(net)
    assert checkpointed is not net
    x, y = toy_batches(dtype=torch.float32)[0]
    run = torch.utils.checkpoint.checkpoint(net, x.requires_grad_(), use_reentrant=False)
    F.cross_entropy(run, y).backward()
    assert all(torch.equal(slot.proxy.grad, expected[slot.layer]) for slot in slots(net))


def test_compiled_once_for_all_draws_with_the_gradients_of_eager():
    torch._dynamo.reset()
    net = toy_net(torch.float32)
    plan = toy_plan(net, "8KiB", batch_size=3, store="int4")
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    x, y = toy_batches(dtype=torch.float32)[0]
    for epoch in range(4):
        optimizer.resample(epoch)
        grads = []
        for run in (net, compiled):
            F.cross_entropy(run(x), y).backward()
            grads.append([slot.proxy.grad for slot in slots(net) if slot.proxy.grad is not None])
            optimizer.zero_grad()
        for grad, reference in zip(*grads, strict=True):
            torch.testing.assert_close(grad, reference)
        optimizer.step()
    assert counter.frame_count == 1


def test_autocast_stores_codes_of_what_the_product_saw():
    with torch.autocast("cpu", torch.bfloat16):
        quantised, reference = gradients(*planned("int8")), gradients(*planned("same"))
    for name, grad in quantised.items():
        assert grad.dtype == torch.float32
        assert 0 < (grad - reference[name]).norm() <= 0.03 * reference[name].norm()


def test_a_plan_keeps_its_store_in_a_file(tmp_path):
    plan = toy_plan(toy_net(torch.float32), "1MiB", store="int4")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.store == "int4"
    assert plan.fingerprint != toy_plan(toy_net(torch.float32), "1MiB").fingerprint


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="store 'int3'"):
        toy_plan(toy_net(), "1MiB", store="int3")
    with pytest.raises(ValueError, match="the budget must count them"):
        toy_plan(toy_net(), 1200, store="int8")
    with pytest.raises(ValueError, match="store 'int2'"):
        replace(CostModel(), store="int2")
