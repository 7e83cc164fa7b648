import math

import pytest
import torch
from torch import nn

from trady_triton import make_plan, rank_layers
from trady_triton.app.train import (
    METHODS,
    evaluate,
    make_optimizer,
    make_scheduler,
    start_epoch,
    train_epoch,
    train_mode,
)

loss_fn = nn.functional.cross_entropy


def batches(count=3, size=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def trained(net, method, *, lr=0.1, **options):
    plan = make_plan(rank_layers(net, batches(1), loss_fn), budget=20000)
    optimizer = make_optimizer(net, method, lr=lr, plan=plan)
    start_epoch(optimizer, 0)
    return optimizer, train_epoch(net, optimizer, batches(), loss_fn, **options)


def running_means(net):
    return [m.running_mean.clone() for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize(("method", "moves"), [("trady", False), ("head", False), ("full", True)])
def test_running_statistics_move_only_where_the_norm_is_trained(net, method, moves):
    before = running_means(net)
    trained(net, method)
    after = running_means(net)
    assert len(before) > 0
    assert all(torch.equal(a, b) != moves for a, b in zip(before, after, strict=True))


def test_train_mode_puts_back_what_evaluate_switched_off(net):
    evaluate(net, batches())
    train_mode(net)
    assert all(module.training for module in net.modules())


def test_head_method_moves_the_classifier_alone(net):
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    trained(net, "head")
    moved = {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_epoch_result_holds_means_over_samples(net):
    net.eval()
    uneven = [*batches(2, size=4), *batches(1, size=2)]
    optimizer = make_optimizer(net, "head", lr=0.0)
    with torch.no_grad():
        outputs = torch.cat([net(x) for x, _ in uneven])
    labels = torch.cat([y for _, y in uneven])
    result = train_epoch(net, optimizer, uneven, loss_fn)
    assert result.loss == pytest.approx(loss_fn(outputs, labels).item(), rel=1e-5)
    assert result.accuracy == pytest.approx((outputs.argmax(1) == labels).float().mean().item())
    assert result.accuracy == evaluate(net, uneven)
    assert result.steps == 3


def test_every_step_is_reported_after_its_update(net):
    optimizer = make_optimizer(net, "head", lr=0.1)
    weights = []
    train_epoch(
        net, optimizer, batches(), loss_fn, on_step=lambda t: weights.append((t.steps, net.classifier.weight.clone()))
    )
    assert [step for step, _ in weights] == [1, 2, 3]
    assert torch.equal(weights[-1][1], net.classifier.weight)
    assert not torch.equal(weights[0][1], weights[1][1])


@pytest.mark.parametrize("method", METHODS)
def test_clipping_bounds_the_length_of_a_step(net, method):
    before = [parameter.detach().clone() for parameter in net.parameters()]
    plan = make_plan(rank_layers(net, batches(1), loss_fn), budget=20000)
    optimizer = make_optimizer(net, method, lr=0.5, plan=plan)
    start_epoch(optimizer, 0)
    train_epoch(net, optimizer, batches(1), loss_fn, max_grad_norm=0.01)
    squares = sum(((p - b).double() ** 2).sum().item() for p, b in zip(net.parameters(), before, strict=True))
    assert math.sqrt(squares) == pytest.approx(0.5 * 0.01, rel=1e-2)


def test_learning_rate_rises_in_a_line_and_falls_in_a_cosine(net):
    optimizer = make_optimizer(net, "head", lr=0.8)
    scheduler = make_scheduler(optimizer, steps=10, warmup_steps=4)
    rates = [optimizer.param_groups[0]["lr"]]
    for epoch in range(2):
        train_epoch(
            net,
            optimizer,
            batches(5, size=1),
            loss_fn,
            scheduler=scheduler,
            first_update=5 * epoch,
            on_step=lambda tally: rates.append(optimizer.param_groups[0]["lr"]),
        )
    rise = [0.0, 0.2, 0.4, 0.6]
    fall = [0.4 * (1 + math.cos(math.pi * step / 6)) for step in range(7)]
    assert rates == pytest.approx(rise + fall, abs=1e-12)


def test_a_tally_goes_on_where_it_was_left(net):
    optimizer = make_optimizer(net, "head", lr=0.0)
    whole = train_epoch(net, optimizer, batches(), loss_fn)
    first = train_epoch(net, optimizer, batches()[:1], loss_fn)
    both = train_epoch(net, optimizer, batches()[1:], loss_fn, tally=first)
    assert (both.steps, both.samples, both.loss, both.accuracy) == (3, 12, whole.loss, whole.accuracy)
    assert both.seconds > first.seconds


def test_a_loss_that_is_not_finite_is_an_error(net):
    optimizer = make_optimizer(net, "head", lr=0.1)
    with pytest.raises(ValueError, match=r"loss is nan at step 0.*learning rate"):
        train_epoch(net, optimizer, batches(), lambda y, t: loss_fn(y, t) * math.nan)


def test_no_batches_is_an_error(net):
    optimizer = make_optimizer(net, "head", lr=0.1)
    with pytest.raises(ValueError, match="no batches to train on"):
        train_epoch(net, optimizer, [], loss_fn)
    with pytest.raises(ValueError, match="no batches to evaluate on"):
        evaluate(net, [])


def test_unknown_method_is_an_error_that_lists_the_known(net):
    with pytest.raises(ValueError, match=r"'lora'.*trady, full, head"):
        make_optimizer(net, "lora", lr=0.1)


def test_trady_without_a_plan_is_an_error(net):
    with pytest.raises(ValueError, match="needs a plan"):
        make_optimizer(net, "trady", lr=0.1)
