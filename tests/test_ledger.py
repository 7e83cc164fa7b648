"""The ledger: what it predicts on fake tensors is what a real step takes."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from nn.nets import plan_at
from torch import Tensor, nn
from toys import toy_batches, toy_net, toy_plan

from trady_triton import (
    Ledger,
    Plan,
    TraDyOptimizer,
    apply_plan,
    backward_in_parts,
    choose_recompute,
    ledger,
    measure,
    remove_plan,
)
from trady_triton.cost import CostModel
from trady_triton.policy import Policy

NETS = {  # name -> image size
    "mobilenetv2_035": 64,
    "tf_efficientnet_lite0": 64,
    "resnet10t": 64,
    "vit_tiny_patch16_224": 224,
    "convnext_atto": 64,
}


def planned(name: str, batch: int = 2, **policy: object) -> tuple[nn.Module, Plan, Tensor, Tensor]:
    """A network, a plan of 64 KiB for two of its layers, inputs and labels."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    size = NETS[name]
    x, y = torch.randn(batch, 3, size, size), torch.arange(batch)
    plan = plan_at(model, x[:1], (0.25, 0.5), policy=Policy(**policy))
    return model, replace(plan, cost=CostModel(batch, 4, 4, unit="bytes"), budget=2**16), x, y


def measured(model: nn.Module, plan: Plan, x: Tensor, y: Tensor, **options: object) -> Ledger:
    apply_plan(model, plan)
    optimizer = TraDyOptimizer(model.parameters(), plan, lr=0.1)
    optimizer.resample(0)
    return measure(model, optimizer, x, y, **options)


@pytest.mark.parametrize("name", NETS)
def test_a_whole_predicted_ledger_is_the_measured_one(name: str) -> None:
    model, plan, x, y = planned(name)
    predicted = ledger(model, plan, x.shape)
    assert predicted == measured(model, plan, x, y)
    assert predicted.kept_by_kind["trained channels"] > 0
    assert predicted.peak_bytes >= predicted.kept_bytes


@pytest.mark.parametrize(
    "options",
    [{"autocast": torch.bfloat16}, {"loss_fn": F.mse_loss}],
    ids=["autocast", "loss"],
)
def test_the_prediction_follows_how_the_step_is_run(options: dict) -> None:
    model, plan, x, y = planned("resnet10t")
    target = torch.zeros(2, 10) if "loss_fn" in options else y
    predicted = ledger(model, plan, x.shape, target=target, **options)
    assert predicted == measured(model, plan, x, target, **options)
    assert predicted != ledger(model, plan, x.shape)


@pytest.mark.parametrize("policy", [{"batch_norm": "train"}, {"recompute": ("blocks.2", "blocks.3")}])
def test_the_prediction_follows_the_policy(policy: dict) -> None:
    model, plan, x, y = planned("mobilenetv2_035", **policy)
    predicted = ledger(model, plan, x.shape)
    assert predicted == measured(model, plan, x, y)


def test_plain_training_is_predicted_as_well() -> None:
    model, _, x, y = planned("mobilenetv2_035")
    predicted = ledger(model, None, x.shape)
    assert predicted == measure(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
    assert predicted.whole_gradient_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert predicted.not_lean == {}


def test_the_state_of_an_optimizer_counts_and_survives_a_measurement() -> None:
    model, batch = toy_net(torch.float32), (torch.randn(2, 3, 12, 12), torch.arange(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    backward_in_parts(model, *batch, F.cross_entropy)
    optimizer.step()
    optimizer.zero_grad()
    before = [entry["momentum_buffer"].clone() for entry in optimizer.state.values()]
    assert measure(model, optimizer, *batch).state_bytes == 4 * sum(p.numel() for p in model.parameters())
    after = [entry["momentum_buffer"] for entry in optimizer.state.values()]
    assert all(map(torch.equal, before, after))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_prediction_does_not_care_whether_the_plan_is_applied() -> None:
    net = toy_net(torch.float32)
    plan = toy_plan(net)
    plain = ledger(net, plan, (3, 3, 12, 12))
    apply_plan(net, plan)
    assert ledger(net, plan, (3, 3, 12, 12)) == plain
    assert net.trady.plan is plan


def test_a_prediction_leaves_the_model_as_it_was() -> None:
    net = toy_net(torch.float32)
    plan = toy_plan(net)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    kinds = [type(module) for module in net.modules()]
    random = torch.random.get_rng_state()
    ledger(net, plan, (3, 3, 12, 12))
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert [type(module) for module in net.modules()] == kinds
    assert not hasattr(net, "trady")
    assert not net.training
    assert all(p.requires_grad and p.grad is None and type(p) is nn.Parameter for p in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_measurement_leaves_the_model_as_it_was_even_where_the_loss_is_not_finite() -> None:
    net = toy_net(torch.float32)
    plan = toy_plan(net, policy=Policy(batch_norm="train"))
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    channels = optimizer.resample(3)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.random.get_rng_state()
    measure(net, optimizer, torch.full((2, 3, 12, 12), torch.inf), torch.arange(2))
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert not net.training
    assert torch.equal(torch.random.get_rng_state(), random)
    assert (optimizer.resample(3), optimizer.param_groups[0]["lr"]) == (channels, 0.1)
    optimizer.resample(4)  # nothing waits


def test_a_measurement_refuses_gradients_that_it_would_spoil() -> None:
    net = toy_net(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    backward_in_parts(net, torch.randn(2, 3, 12, 12), torch.arange(2), F.cross_entropy)
    with pytest.raises(RuntimeError, match="zero_grad"):
        measure(net, optimizer, torch.randn(2, 3, 12, 12), torch.arange(2))


class Squares(nn.Module):
    """A module that nobody teaches."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x


def test_an_untaught_module_is_named_with_its_bytes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), Squares(), nn.Linear(5, 4), Squares(), nn.Linear(4, 3)).double()
    from trady_triton import make_plan, rank_layers

    batch = torch.randn(7, 6, dtype=torch.float64), torch.arange(7) % 3
    plan = make_plan(rank_layers(net, [batch], F.cross_entropy), budget=30, coverage=1.0)
    books = ledger(net, plan, (7, 6))
    assert books.not_lean == {"Squares": {"1": 7 * 5 * 8, "3": 7 * 4 * 8}}
    assert "not lean: 2 Squares, as 1" in books.table()


def test_a_forward_that_depends_on_values_is_refused_by_name() -> None:
    class Sorted(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[x[:, 0, 0, 0].nonzero()[:, 0]])

    net = Sorted(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    plan = plan_at(net, torch.randn(2, 3, 2, 2), (0.0,))
    with pytest.raises(ValueError, match=r"Sorted cannot be predicted: .* aten\.nonzero"):
        ledger(net, plan, (2, 3, 2, 2))


def test_bytes_and_flops_are_those_of_the_plan() -> None:
    net = toy_net(torch.float32)
    plan = replace(toy_plan(net, budget="6KiB", batch_size=3))
    books, drawn = ledger(net, plan, (3, 3, 12, 12), epoch=5), plan.sample(5)
    gradients = sum(len(ids) * plan.cost.gradient_cost(plan.shapes[name]) for name, ids in drawn.items())
    assert books.compact_gradient_bytes == gradients > 0
    assert books.kept_by_kind["trained channels"] + gradients == plan.used(drawn)
    assert books.draw_bytes == 8 * sum(map(len, drawn.values())) + 4 * len(plan.pool)
    head = net.head.weight.numel() + net.head.bias.numel()
    assert books.whole_gradient_bytes == 4 * head
    wgrad = sum(len(ids) * plan.shapes[name].channel_wgrad_flops for name, ids in drawn.items())
    assert books.wgrad_flops == 3 * (wgrad + 2 * net.head.weight.numel())


def test_a_split_batch_gives_the_gradient_of_the_whole() -> None:
    net = toy_net()
    x, y = torch.randn(5, 3, 12, 12, dtype=torch.float64), torch.arange(5)
    loss = backward_in_parts(net, x, y, F.cross_entropy)
    whole = [p.grad for p in net.parameters()]
    net.zero_grad()
    assert torch.allclose(backward_in_parts(net, x, y, F.cross_entropy, 2), loss, rtol=1e-12)
    for parameter, grad in zip(net.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-12)
    net.zero_grad()
    with pytest.raises(ValueError, match="target of 4 samples: wanted 5"):
        backward_in_parts(net, x, y[:4], F.cross_entropy, 2)
    with pytest.raises(ValueError, match="batch is empty"):
        backward_in_parts(net, x[:0], y[:0], F.cross_entropy)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_ledger_survives_its_file(tmp_path) -> None:
    net = toy_net(torch.float32)
    books = ledger(net, toy_plan(net), (3, 3, 12, 12))
    books.save(tmp_path / "ledger.json")
    assert Ledger.load(tmp_path / "ledger.json") == books
    assert hasattr(net, "trady") is False
    with pytest.raises(ValueError, match="no plan"):
        remove_plan(net)


def test_draws_that_need_scores_are_predicted_by_them() -> None:
    net = toy_net(torch.float32)
    plan = toy_plan(net, 400, coverage=None, sampler="d-norm")
    scores = {name: torch.arange(float(plan.shapes[name].in_channels)) for name in plan.pool}
    (x, y), *_ = toy_batches(dtype=torch.float32)
    with pytest.raises(ValueError, match="wanted scores"):
        ledger(net, plan, x.shape)
    plan = choose_recompute(plan, net, x.shape, scores=scores)
    predicted = ledger(net, plan, x.shape, scores=scores)
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    optimizer.resample(0, scores)
    assert measure(net, optimizer, x, y) == predicted


def test_a_step_whose_peak_is_its_update_is_predicted_to_the_byte() -> None:
    net = toy_net(torch.float32)
    plan = toy_plan(net, None, coverage=None, sampler="neq")
    (x, y), *_ = toy_batches(dtype=torch.float32)
    x, y = x[:1, :, :4, :4].clone(), y[:1].clone()
    predicted = ledger(net, plan, x.shape, weight_decay=0.1)
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1, weight_decay=0.1)
    optimizer.resample(0)
    assert measure(net, optimizer, x, y) == predicted
