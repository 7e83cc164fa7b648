"""strict: an optimizer that refuses a step of more memory than its plan promises."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import toy_net, toy_plan, toy_ranking

from trady_triton import TraDyOptimizer, apply_plan, backward_in_parts, make_plan, measure
from trady_triton.meters import storage_bytes
from trady_triton.optim.strict import StepMemory

SHAPE = (8, 3, 12, 12)


def strict_training(memory: int | str = "64KiB", **options: object) -> tuple[nn.Module, TraDyOptimizer]:
    net = toy_net(torch.float32)
    plan = make_plan(toy_ranking(net), memory=memory, model=net, input_shape=SHAPE, coverage=1.0, **options)
    optimizer = TraDyOptimizer(apply_plan(net, plan).parameters(), plan, lr=0.1, strict=True)
    optimizer.resample(0)
    return net, optimizer


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, *SHAPE[1:]), torch.arange(size) % 5


def run(net: nn.Module, optimizer: TraDyOptimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    with optimizer.metered():
        backward_in_parts(net, x, y, F.cross_entropy, optimizer.plan.micro_batch)


def counted(optimizer: TraDyOptimizer) -> int:
    """The figure that a refusal names: the limit is lowered to get it."""
    optimizer.memory._limit = 1
    with pytest.raises(RuntimeError, match="this step took") as refusal:
        optimizer.step()
    return int(re.search(r"took (\d+) bytes", str(refusal.value))[1])


def test_steps_as_planned_pass_in_every_epoch() -> None:
    net, optimizer = strict_training()
    before = net.head.weight.detach().clone()
    for epoch in range(3):
        optimizer.resample(epoch)
        for _ in range(2):
            run(net, optimizer, *batch())
            optimizer.step()
    assert not torch.equal(net.head.weight, before)


def test_a_larger_batch_is_refused_and_changes_nothing() -> None:
    net, optimizer = strict_training(micro_batch=8, memory="256KiB")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    run_whole(net, optimizer, *batch(64))
    with pytest.raises(RuntimeError, match=r"took \d+ bytes .*the 262144 that the plan promises.*8 samples at a time"):
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    run(net, optimizer, *batch())
    optimizer.step()
    assert not torch.equal(net.head.weight, before["head.weight"])


def run_whole(net: nn.Module, optimizer: TraDyOptimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    with optimizer.metered():
        F.cross_entropy(net(x), y).backward()


def test_the_count_is_that_of_measure_but_for_the_batch() -> None:
    net, optimizer = strict_training()
    x, y = batch()
    total = measure(net, optimizer, x, y).total_bytes
    run(net, optimizer, x, y)
    assert counted(optimizer) == total - storage_bytes([x, y])


def test_parts_that_are_counted_apart_count_for_their_highest() -> None:
    net, optimizer = strict_training()
    x, y = batch()
    totals = []
    for size in (4, 8):
        for part in (x[:size].clone(), x[size:].clone()):
            if len(part):
                run_part(net, optimizer, part, y[: len(part)])
        totals.append(counted(optimizer))
        optimizer.zero_grad()
    assert totals[0] < totals[1]


def run_part(net: nn.Module, optimizer: TraDyOptimizer, x: Tensor, y: Tensor) -> None:
    with optimizer.metered():
        F.cross_entropy(net(x), y).backward()


def test_a_closure_is_counted() -> None:
    net, optimizer = strict_training()
    x, y = batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward_in_parts(net, x, y, F.cross_entropy, optimizer.plan.micro_batch)

    assert optimizer.step(closure) > 0


def test_a_step_that_nobody_counted_is_refused() -> None:
    net, optimizer = strict_training()
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    with pytest.raises(RuntimeError, match=r"with optimizer.metered\(\)"):
        optimizer.step()
    run(net, optimizer, x, y)
    optimizer.step()
    optimizer.zero_grad()
    backward_in_parts(net, x, y, F.cross_entropy)
    with pytest.raises(RuntimeError, match=r"with optimizer.metered\(\)"):
        optimizer.step()
    run(net, optimizer, x, y)
    optimizer.zero_grad()
    optimizer.resample(1)  # counts anew
    backward_in_parts(net, x, y, F.cross_entropy)
    with pytest.raises(RuntimeError, match=r"with optimizer.metered\(\)"):
        optimizer.step()


def test_an_error_inside_the_block_ends_the_count() -> None:
    net, optimizer = strict_training()
    with pytest.raises(KeyError), optimizer.metered():
        raise KeyError
    run(net, optimizer, *batch())
    optimizer.step()


def test_without_strict_nothing_is_looked_at() -> None:
    net = toy_net(torch.float32)
    plan = make_plan(toy_ranking(net), memory="64KiB", model=net, input_shape=SHAPE)
    optimizer = TraDyOptimizer(apply_plan(net, plan).parameters(), plan, lr=0.1)
    optimizer.resample(0)
    run_whole(net, optimizer, *batch(64))
    optimizer.step()


def test_strict_needs_a_plan_that_promises() -> None:
    net = toy_net(torch.float32)
    plan = toy_plan(net)
    apply_plan(net, plan)
    with pytest.raises(ValueError, match=r"promises no memory; wanted one of make_plan\(\.\.\., memory=\.\.\.\)"):
        TraDyOptimizer(net.parameters(), plan, strict=True)


class Allocator:
    """Stands in for torch.cuda's statistics."""

    now = peak = 0

    def use(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def test_on_cuda_all_since_the_last_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, owned = Allocator(), torch.zeros(10, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocator.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocator.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(allocator, "peak", allocator.now))
    plan = make_plan(toy_ranking(net := toy_net()), memory="1MiB", model=net, input_shape=(1, 3, 12, 12))
    allocator.use(5000)  # somebody else's
    memory = StepMemory(plan, torch.device("cuda"), lambda: [owned])
    memory.restart()
    allocator.use(2**20 - 10)
    allocator.use(-1000)
    memory.check()
    allocator.use(1001)
    with memory.metered():
        pass
    memory.check()
    allocator.use(2**20 - 9)
    allocator.use(-(2**20))
    with pytest.raises(RuntimeError, match=r"took 1048577 bytes .* 1 more than"):
        memory.check()
    memory.check()


def test_a_process_without_a_batch_takes_part_in_the_step_of_the_others() -> None:
    _, optimizer = strict_training()
    optimizer.join_hook().main_hook()
