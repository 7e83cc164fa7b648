"""The meters against cases counted by hand, and against the accountant of the plans."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from trady_triton import TraDyOptimizer, apply_plan, make_plan, rank_layers
from trady_triton.meters import OUTSIDE, FlopsByKind, KeptBytes, peak_memory
from trady_triton.policy import Policy

FLOAT = 4  # bytes


def small_net() -> nn.Sequential:
    """Dense, strided, grouped and depthwise convolutions, normalisation, activations and two linears; 8 px images."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 12, 1, stride=2),
        nn.Conv2d(12, 8, 3, padding=1, groups=4),
        nn.Flatten(),
        nn.Linear(8 * 16, 6),
        nn.GELU(),
        nn.Linear(6, 5),
    )


def planned_net(batch_size: int, budget: str = "6KiB") -> tuple[nn.Sequential, TraDyOptimizer]:
    """small_net with every layer in the pool and the channels of epoch 0 drawn."""
    torch.manual_seed(0)
    model = small_net()
    batch = torch.randn(batch_size, 3, 8, 8), torch.arange(batch_size) % 5
    plan = make_plan(rank_layers(model, [batch], F.cross_entropy), budget=budget, coverage=1.0, batch_size=batch_size)
    apply_plan(model, plan).eval()
    optimizer = TraDyOptimizer(model.parameters(), plan, lr=0.1)
    optimizer.resample(0)
    return model, optimizer


def test_kept_bytes_of_a_linear_and_a_relu() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    with KeptBytes(model) as kept:
        output = model(torch.randn(7, 3))
    # input 7x3, and the ReLU's output 7x4, which the second Linear keeps as well; weights do not count
    assert kept.by_layer == {"0": 7 * 3 * FLOAT, "1": 7 * 4 * FLOAT}
    assert kept.by_kind == {"conv and linear": 7 * 3 * FLOAT, "activation": 7 * 4 * FLOAT}
    assert output.requires_grad


def test_kept_bytes_count_a_view_as_its_whole_storage_once() -> None:
    model = nn.Linear(3, 4)
    base = torch.randn(10, 3)
    with KeptBytes(model) as kept:
        outputs = model(base[:2]), model(base[5:])
    assert kept.total == 10 * 3 * FLOAT
    assert len(outputs) == 2


def test_kept_bytes_leave_out_what_was_freed_with_its_graph() -> None:
    model = nn.Linear(3, 4)
    with KeptBytes(model) as kept:
        model(torch.randn(7, 3))
    assert kept.total == 0


def test_kept_bytes_leave_no_graph_behind_that_saved_its_own_output() -> None:
    model = nn.Linear(3, 4)
    with KeptBytes(model) as kept:
        loss = model(torch.randn(7, 3)).exp().sum()
    saved = [reference for reference, _ in kept._saved]
    assert any(reference() is not None for reference in saved)
    del loss
    assert all(reference() is None for reference in saved)


def test_kept_bytes_of_the_loss_lie_outside_the_model() -> None:
    model = nn.Linear(3, 4)
    with KeptBytes(model) as kept:
        loss = model(torch.randn(7, 3)).exp().sum()
    assert kept.by_layer == {"": 7 * 3 * FLOAT, OUTSIDE: 7 * 4 * FLOAT}
    assert loss.requires_grad


def test_kept_bytes_change_neither_values_nor_gradients() -> None:
    torch.manual_seed(0)
    model, x = small_net(), torch.randn(2, 3, 8, 8)
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with KeptBytes(model):
        loss = model(x).square().sum()
    loss.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), wanted, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_kept_bytes_of_the_trained_channels_are_what_the_plan_charges() -> None:
    model, optimizer = planned_net(batch_size=4)
    plan = optimizer.plan
    with KeptBytes(model) as kept:
        loss = model(torch.randn(4, 3, 8, 8)).sum()
    wanted = {name: len(ids) * plan.cost.activation_cost(plan.shapes[name]) for name, ids in plan.sample(0).items()}
    stores = {name: kept.by_layer.get(name, 0) for name in plan.pool}
    assert stores == wanted
    assert kept.by_kind["trained channels"] == sum(wanted.values()) > 0
    assert loss.requires_grad


def test_peak_memory_of_a_chain_by_hand() -> None:
    x = torch.randn(100)
    with peak_memory() as memory:
        y = x * 2  # 100 live
        y = y + 1  # 200 while both live, then 100
        z = torch.cat([y, y])  # 300
        del y  # 200
        w = z[:10]  # a view adds nothing
    assert memory.peak_bytes == 300 * FLOAT
    assert memory.live_bytes == 200 * FLOAT
    del z
    assert memory.live_bytes == 200 * FLOAT
    del w
    assert memory.live_bytes == 0


def test_peak_memory_ignores_what_existed_before() -> None:
    x = torch.randn(100)
    with peak_memory() as memory:
        y = x.view(10, 10).t()
        y.add_(1)
    assert memory.peak_bytes == 0


def test_peak_memory_sees_tensors_made_of_numbers() -> None:
    with peak_memory() as real:
        kept = torch.tensor([1.0] * 50)
    with FakeTensorMode(), peak_memory() as fake:
        torch.tensor([1.0] * 50)
    assert real.live_bytes == real.peak_bytes == fake.peak_bytes == kept.numel() * FLOAT


def test_the_peak_of_fake_tensors_on_a_gpu_is_not_its_allocators() -> None:
    with FakeTensorMode(), peak_memory("cuda") as memory:
        torch.empty(10)
    assert memory.peak_bytes == 10 * 4


def test_peak_memory_sees_the_backward() -> None:
    weight = torch.randn(1000, requires_grad=True)
    with peak_memory() as memory:
        loss = (weight * weight).sum()
        forward_peak = memory.peak_bytes
        loss.backward()
    # forward: the square and its sum; backward: both halves 2 * 1000 of the gradient, and the expanded 1 of the sum
    assert forward_peak == (1000 + 1) * FLOAT
    assert memory.peak_bytes > 2 * 1000 * FLOAT
    assert memory.live_bytes == (1000 + 1) * FLOAT
    assert weight.grad is not None


@pytest.mark.parametrize("no_grad", [True, False])
def test_peak_memory_under_fake_tensors_is_that_of_the_real_step(no_grad: bool) -> None:
    def measure() -> int:
        model, x = small_net(), torch.randn(4, 3, 8, 8)
        with torch.set_grad_enabled(not no_grad), peak_memory() as memory:
            loss = model(x).square().sum()
            if not no_grad:
                loss.backward()
        return memory.peak_bytes

    with FakeTensorMode():
        predicted = measure()
    assert predicted == measure() > 0


def test_kept_bytes_under_fake_tensors_are_those_of_the_real_forward() -> None:
    def measure() -> dict[str, int]:
        model = small_net()
        with KeptBytes(model) as kept:
            loss = model(torch.randn(4, 3, 8, 8)).square().sum()
        assert loss.requires_grad
        return kept.by_layer

    with FakeTensorMode():
        predicted = measure()
    assert predicted == measure()


def test_flops_of_a_dense_linear_and_convolution_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 36, 7))
    with FlopsByKind(model) as flops:
        model(torch.randn(2, 3, 6, 6)).sum().backward()
    conv, linear = 2 * 2 * 36 * 4 * 3 * 9, 2 * 2 * 4 * 36 * 7
    assert flops.forward_flops == conv + linear
    assert flops.dgrad_flops == linear  # the images need no gradient
    assert flops.wgrad_flops == conv + linear
    assert flops.get_total_flops() == 2 * conv + 3 * linear


@pytest.mark.parametrize(("train_weight", "train_bias"), [(True, True), (True, False), (False, True)])
def test_flops_of_a_linear_follow_what_is_trained(train_weight: bool, train_bias: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight.requires_grad_(train_weight)
    model[2].bias.requires_grad_(train_bias)
    with FlopsByKind(model) as flops:
        model(torch.randn(6, 6)).square().sum().backward()  # square operands: no shape tells dX and dW apart
    one = 2 * 6 * 6 * 6
    assert (flops.forward_flops, flops.dgrad_flops, flops.wgrad_flops) == (2 * one, one, one * (1 + train_weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_flops_of_attention_are_no_weight_gradients_under_autocast_too(dtype: torch.dtype) -> None:
    model = nn.Linear(8, 24)
    with FlopsByKind(model) as flops, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        x = torch.randn(2, 5, 8, requires_grad=True) * 2
        q, k, v = model(x).chunk(3, dim=-1)
        (torch.softmax(q @ k.transpose(1, 2), -1) @ v).sum().backward()
    linear, attention = 2 * 10 * 8 * 24, 2 * (2 * 2 * 5 * 5 * 8)
    assert flops.wgrad_flops == linear
    assert flops.dgrad_flops == linear + 2 * attention
    assert flops.forward_flops == linear + attention


def test_flops_of_a_grouped_weight_gradient_are_the_accountants() -> None:
    model = small_net()
    batch = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    ranking = rank_layers(model, [batch], F.cross_entropy, head=[])
    with FlopsByKind(model) as flops:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
    assert flops.wgrad_flops == 3 * sum(layer.shape.dense_flops for layer in ranking.layers)
    assert flops.forward_flops == flops.wgrad_flops
    assert flops.dgrad_flops == flops.wgrad_flops - 3 * ranking.layers[0].shape.dense_flops


@pytest.mark.parametrize("epoch", range(3))
def test_weight_gradient_flops_of_a_planned_net_are_the_plans(epoch: int) -> None:
    model, optimizer = planned_net(batch_size=3)
    plan = optimizer.plan
    channels = optimizer.resample(epoch)
    with FlopsByKind(model) as flops:
        model(torch.randn(3, 3, 8, 8)).sum().backward()
    head = 2 * 3 * 6 * 5
    wanted = sum(len(ids) * plan.shapes[name].channel_wgrad_flops for name, ids in channels.items())
    assert flops.wgrad_flops == 3 * wanted + head
    assert wanted > 0


def test_flops_repeated_by_checkpointing_are_forward_flops() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    one = 2 * 6 * 6 * 6
    with FlopsByKind(model) as flops:
        x = torch.randn(6, 6, requires_grad=True) * 2
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert flops.forward_flops in (3 * one, 4 * one)  # the last layer need not be repeated
    assert (flops.dgrad_flops, flops.wgrad_flops) == (2 * one, 2 * one)


def test_flops_of_lean_layers_repeated_by_checkpointing_are_forward_flops() -> None:
    def flops(**policy: object) -> tuple[int, int]:
        torch.manual_seed(0)
        model = nn.Sequential(small_net(), nn.Linear(5, 5))
        batch = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
        ranking = rank_layers(model, [batch], F.cross_entropy)
        plan = make_plan(ranking, budget=600, coverage=1.0, policy=Policy(**policy))
        optimizer = TraDyOptimizer(apply_plan(model, plan).parameters(), plan)
        optimizer.resample(0)
        with FlopsByKind(model) as counted:
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        return counted.dgrad_flops, counted.wgrad_flops

    assert flops(recompute=("0",)) == flops()


def test_the_planned_net_of_these_tests_draws_from_every_kind_of_layer() -> None:
    model, optimizer = planned_net(batch_size=3)
    modules = dict(model.named_modules())
    drawn = Counter[str]()
    for epoch in range(3):
        for name, ids in optimizer.plan.sample(epoch).items():
            layer = modules[name]
            drawn[f"{type(layer).__name__} groups={getattr(layer, 'groups', 1)}"] += len(ids)
    assert set(drawn) == {"LeanConv2d groups=1", "LeanConv2d groups=8", "LeanConv2d groups=4", "LeanLinear groups=1"}
    assert min(drawn.values()) > 0
