"""Planned networks under torch.compile: one compilation for all draws, the gradients and the bytes of eager."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from nn.kept import forward_backward, lean_twin
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.ops.misc import SqueezeExcitation
from toys import toy_batches, toy_net, toy_plan

from trady_triton import Plan, TraDyOptimizer, apply_plan, make_plan, rank_layers
from trady_triton.nn.activation import LeanReLU
from trady_triton.policy import Policy
from trady_triton.slot import ChannelSlot, find_slot

NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=4),
    "mobilenetv2": lambda: timm.create_model("mobilenetv2_035", num_classes=4),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=64, depth=2),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=4, img_size=56, embed_dim=24, depths=(2, 2), num_heads=(2, 4)
    ),
}
SIZES = {"swin": 56}
# Older partitioners take every unknown number of channels for 4096, so they may keep an input rather than its store.
knows_hints = hasattr(torch.fx.experimental.symbolic_shapes, "optimization_hint")
BUDGETS = {"vit": "20KiB", "swin": "20KiB"}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def planned(net: nn.Module, batch: tuple[Tensor, Tensor], budget: str, **options) -> tuple[Plan, TraDyOptimizer]:
    ranking = rank_layers(net, [batch], F.cross_entropy)
    plan = make_plan(ranking, budget=budget, coverage=1.0, batch_size=len(batch[0]), **options)
    apply_plan(net, plan)
    return plan, TraDyOptimizer(net.parameters(), plan, lr=0.1)


def batch_for(name: str) -> tuple[Tensor, Tensor]:
    size = SIZES.get(name, 64)
    return torch.randn(2, 3, size, size), torch.tensor([0, 1])


def kept(net: nn.Module, x: Tensor) -> tuple[Counter[tuple[torch.dtype, int]], set[int]]:
    """What a forward keeps: (dtype, bytes) of every storage of its own, and the parameters that it refers to."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    owned |= {slot.channels.untyped_storage().data_ptr() for p in net.parameters() if (slot := find_slot(p))}
    alive: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        alive[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = net(x)
    own = Counter((t.dtype, t.untyped_storage().nbytes()) for pointer, t in alive.items() if pointer not in owned)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()} & alive.keys()
    del y
    return own, weights


def gradients(optimizer: TraDyOptimizer) -> list[Tensor]:
    return [p.grad.clone() for p in optimizer.param_groups[0]["params"] if p.grad is not None]


def grads_of(net: nn.Module, optimizer: TraDyOptimizer, x: Tensor, y: Tensor) -> list[Tensor]:
    F.cross_entropy(net(x), y).backward()
    grads = gradients(optimizer)
    optimizer.zero_grad()
    return grads


def assert_same(grads: list[Tensor], expected: list[Tensor]) -> None:
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference)


@pytest.mark.parametrize("name", NETS)
def test_one_compilation_gives_the_gradients_and_the_bytes_of_eager_for_every_draw(name):
    torch.manual_seed(0)
    net, batch = NETS[name]().eval(), batch_for(name)
    plan, optimizer = planned(net, batch, BUDGETS.get(name, "100KiB"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    counts = set()
    for epoch in range(8):
        counts |= {len(ids) for ids in optimizer.resample(epoch).values()}
        assert_same(grads_of(compiled, optimizer, *batch), grads_of(net, optimizer, *batch))
        optimizer.step()
    assert len(counts) > 3
    assert any(len(plan.sample(epoch)) < len(plan.pool) for epoch in range(8)), "no draw leaves a layer out"
    lowest = next(layer for layer in plan.shapes if layer in plan.pool)  # below what is drawn eager keeps nothing
    optimizer.resample(next(epoch for epoch in range(99) if lowest in plan.sample(epoch)))
    (own, weights), (expected, same_weights) = kept(compiled, batch[0]), kept(net, batch[0])
    assert counter.frame_count == 1
    assert weights == same_weights
    assert own == expected or not knows_hints


@pytest.mark.skipif(not knows_hints, reason="this torch's partitioner does not know how many channels to expect")
def test_compiled_code_keeps_the_packed_activations_of_eager():
    torch.manual_seed(0)
    net, batch = NETS["vit"]().eval(), batch_for("vit")
    _, optimizer = planned(net, batch, "2MiB", policy=Policy(activations=8))
    optimizer.resample(0)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    (own, _), (expected, _) = kept(compiled, batch[0]), kept(net, batch[0])
    row = 4 * 2 * 17  # LayerNorm's one number a token may be kept twice
    assert {k: n for k, n in own.items() if k[1] > row} == {k: n for k, n in expected.items() if k[1] > row}
    assert sum(n for (dtype, _), n in own.items() if dtype in (torch.uint8, torch.int8)) == 7
    assert_same(grads_of(compiled, optimizer, *batch), grads_of(net, optimizer, *batch))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_gradients_of_eager_for_every_draw():
    net = toy_net(torch.float32)
    plan = toy_plan(net)
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    x, y = toy_batches(dtype=torch.float32)[0]
    for epoch in range(4):
        optimizer.resample(epoch)
        assert_same(grads_of(compiled, optimizer, x, y), grads_of(net, optimizer, x, y))
    assert counter.frame_count == 1


def test_checkpointed_blocks_compile_and_repeat_their_stores_bit_for_bit():
    torch.manual_seed(0)
    net, batch = NETS["vit"]().eval(), batch_for("vit")
    _, optimizer = planned(net, batch, "100KiB")
    optimizer.resample(0)
    expected = grads_of(net, optimizer, *batch)
    own, _ = kept(net, batch[0])
    net.set_grad_checkpointing()
    net.train()  # timm checkpoints in training alone; this net has neither dropout nor batch norm
    assert sum(size * n for (_, size), n in kept(net, batch[0])[0].items()) < sum(s * n for (_, s), n in own.items())
    for run in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        grads = grads_of(run, optimizer, *batch)
        assert all(torch.equal(grad, reference) for grad, reference in zip(grads, expected, strict=True))


def test_autocast_channels_last_and_accumulation_compile():
    torch.manual_seed(0)
    net = NETS["resnet50"]().eval().to(memory_format=torch.channels_last)
    x, y = batch_for("resnet50")
    x = x.to(memory_format=torch.channels_last)
    _, optimizer = planned(net, (x, y), "100KiB")
    optimizer.resample(0)
    accumulated = []
    for run in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        for half in (slice(0, 1), slice(1, 2)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(run(x[half]), y[half])
            loss.backward()
        accumulated.append(gradients(optimizer))
        optimizer.zero_grad()
    assert_same(accumulated[1], accumulated[0])


def test_compiled_in_place_activations_change_their_input():
    relu = torch.compile(lambda x: (LeanReLU(inplace=True)(x), x), backend="aot_eager", fullgraph=True)
    leaf = torch.randn(5, requires_grad=True)
    y, x = relu(leaf * 1)
    assert torch.equal(x, leaf.relu())
    (y.sum() + x.sum()).backward()
    assert torch.equal(leaf.grad, 2.0 * (leaf > 0))


@pytest.mark.parametrize("module", [nn.LeakyReLU(0.1), nn.LeakyReLU(0.1, inplace=True), nn.Dropout(0.4)])
@pytest.mark.parametrize("size", [(2, 8, 7), (3, 5, 3)], ids=["full bytes", "ragged"])
def test_compiled_masks_are_those_of_eager(module, size):
    x, dy = torch.randn(size), torch.randn(size)
    found = []
    lean = lean_twin(module)
    for run in (lean, torch.compile(lean, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(3)
        found.append(forward_backward(run, x, dy))
    torch.testing.assert_close(*found)


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


def test_a_packed_gate_of_which_nothing_is_drawn_compiles():
    found = []
    for draws in ((), (0, 2)):
        for compiled in (False, True):
            torch._dynamo.reset()
            torch.manual_seed(0)
            lean = lean_twin(SqueezeExcitation(8, 4), activations=8)
            slot = lean.fc1.slot = ChannelSlot("fc1", lean.fc1.weight, 1, "")
            slot.set(draws)
            run = torch.compile(lean, backend="aot_eager") if compiled else lean
            found.append(
                (forward_backward(run, torch.linspace(-1, 1, 3 * 8 * 15).view(3, 8, 5, 3))[1], slot.proxy.grad)
            )
    for eager, compiled in (found[:2], found[2:]):
        torch.testing.assert_close(compiled, eager)
