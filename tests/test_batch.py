"""Batches that are mappings, for models that take their inputs by name and compute the loss themselves."""

from dataclasses import asdict, dataclass

import pytest
import torch
import torch.nn.functional as F
from toys import ToyNet, toy_batches, toy_net, toy_ranking

from trady_triton import (
    TraDyOptimizer,
    apply_plan,
    backward_in_parts,
    choose_recompute,
    ledger,
    make_plan,
    measure,
    rank_layers,
)
from trady_triton.batch import split


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class NamedNet(ToyNet):
    def forward(self, pixels, labels):
        logits = super().forward(pixels)
        return Output(F.cross_entropy(logits, labels), logits)


def loss_of(output, batch):
    return output.loss


def named_net():
    torch.manual_seed(0)
    return NamedNet().double().eval()


def named_batches(count=1, size=3):
    return [{"pixels": x, "labels": y} for x, y in toy_batches(count, size)]


def test_a_ranking_is_the_same_as_of_pairs():
    assert rank_layers(named_net(), named_batches(2), loss_of) == rank_layers(
        toy_net(), toy_batches(2), F.cross_entropy
    )


def test_batches_that_are_no_tensors_are_named():
    with pytest.raises(TypeError, match="batch of type list: wanted a tensor or a mapping of tensors"):
        rank_layers(named_net(), [{"pixels": [1, 2]}], loss_of)
    with pytest.raises(TypeError, match="batch of type empty mapping"):
        rank_layers(named_net(), [{}], loss_of)


def test_parts_give_the_gradient_of_the_whole():
    (batch,) = named_batches(size=5)
    assert [len(part["labels"]) for part in split(batch, 2)] == [2, 2, 1]
    whole, parts = named_net(), named_net()
    loss_of(whole(**batch), batch).backward()
    total = backward_in_parts(parts, batch, batch, loss_of, micro_batch=2)
    torch.testing.assert_close(total, whole(**batch).loss.detach(), rtol=1e-12, atol=0)
    for one, other in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_ledger_predicts_what_is_measured(micro_batch):
    (batch,) = named_batches(size=4)
    net = named_net()
    plan = make_plan(toy_ranking(toy_net()), budget=1200)
    predicted = ledger(net, plan, batch, loss_fn=loss_of, micro_batch=micro_batch)
    optimizer = TraDyOptimizer(apply_plan(net, plan).parameters(), plan)
    optimizer.resample(0)
    measured = measure(net, optimizer, batch, batch, loss_fn=loss_of, micro_batch=micro_batch)
    assert asdict(predicted) == asdict(measured)
    assert predicted.batch_bytes == sum(tensor.nbytes for tensor in batch.values())


def test_a_memory_is_promised_for_a_mapping():
    (batch,) = named_batches(size=4)
    plan = make_plan(toy_ranking(toy_net()), memory="256KiB", model=named_net(), input_shape=batch, loss_fn=loss_of)
    assert ledger(named_net(), plan, batch, loss_fn=loss_of).total_bytes <= 256 * 1024
    assert choose_recompute(plan, named_net(), batch).policy.recompute == ()
    with pytest.raises(ValueError, match=r"smallest workable memory is .* at 1 of 4 samples"):
        make_plan(toy_ranking(toy_net()), memory="1KiB", model=named_net(), input_shape=batch, loss_fn=loss_of)
