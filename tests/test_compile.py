"""Planned networks under torch.compile: the gradients and the bytes of eager."""

import pytest
import timm
import torch
import torch.nn.functional as F
from toys import toy_batches, toy_net, toy_plan

from trady_triton import TraDyOptimizer, apply_plan, make_plan, rank_layers


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def saved_bytes(net, x):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    owned = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = net(x)
    return sum(size for pointer, size in kept.items() if pointer not in owned), y


def gradients(optimizer):
    return [p.grad.clone() for p in optimizer.param_groups[0]["params"] if p.grad is not None]


def test_compiled_gradients_equal_eager_ones_without_a_graph_break():
    net = toy_net()
    plan = toy_plan(net)
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x, y = toy_batches()[0]
    for epoch in range(2):
        optimizer.resample(epoch)
        F.cross_entropy(net(x), y).backward()
        expected = gradients(optimizer)
        optimizer.zero_grad()
        F.cross_entropy(compiled(x), y).backward()
        for grad, reference in zip(gradients(optimizer), expected, strict=True):
            torch.testing.assert_close(grad, reference)
        optimizer.step()
        optimizer.zero_grad()


def test_pending_gradients_of_compiled_code_are_noticed():
    net = toy_net()
    plan = toy_plan(net)
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    optimizer.resample(0)
    torch.compile(net, backend="aot_eager")(toy_batches()[0][0]).sum().backward()
    with pytest.raises(RuntimeError, match="gradients wait"):
        optimizer.resample(1)


def test_a_backward_of_compiled_code_after_a_new_draw_is_an_error():
    net = toy_net()
    plan = toy_plan(net)
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    optimizer.resample(0)
    loss = torch.compile(net, backend="aot_eager")(toy_batches()[0][0]).sum()
    optimizer.resample(1)
    with pytest.raises(RuntimeError, match="before the last resample"):
        loss.backward()


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_035"])
def test_a_compiled_network_keeps_no_more_than_eager(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=4).eval()
    batch = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    plan = make_plan(rank_layers(net, [batch], F.cross_entropy), budget="64KiB", batch_size=2)
    apply_plan(net, plan)
    TraDyOptimizer(net.parameters(), plan).resample(0)
    eager, output = saved_bytes(net, batch[0])
    compiled, same = saved_bytes(torch.compile(net, backend="aot_eager"), batch[0])
    torch.testing.assert_close(same, output)
    assert compiled <= eager
