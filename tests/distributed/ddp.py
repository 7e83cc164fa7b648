"""DistributedDataParallel on two processes, against one process on the joined batch. Run by torchrun."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from toys import toy_batches, toy_net, toy_plan

from trady_triton import TraDyOptimizer, apply_plan
from trady_triton.optim.distributed import average_gradients_

KINDS = [{}, {"momentum": 0.9, "max_grad_norm": 0.05}, {"algorithm": "adamw", "weight_decay": 0.1}]


def planned(seed=0, sampler="trady", **options):
    net = toy_net()
    plan = toy_plan(net, 400, seed=seed, sampler=sampler, coverage=None)
    apply_plan(net, plan)
    return net, TraDyOptimizer(net.parameters(), plan, lr=0.05, **options)


def own(batch, size=None):
    """This process's samples: half of them, or `size` for the first process and the rest for the second."""
    size = len(batch[0]) // 2 if size is None else size
    part = slice(0, size) if dist.get_rank() == 0 else slice(size, None)
    return batch[0][part], batch[1][part]


def trained(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def assert_same(net, reference):
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-10, atol=1e-12)


class Sent:
    """Bytes that go through all_reduce, but for those that DistributedDataParallel sends from C++."""

    def __enter__(self):
        self.sizes, self.real = [], dist.all_reduce
        dist.all_reduce = self.count
        return self

    def count(self, tensor, *args, **kwargs):
        self.sizes.append(tensor.nbytes)
        return self.real(tensor, *args, **kwargs)

    def __exit__(self, *error):
        dist.all_reduce = self.real


def train_both(options, train_parallel, train_alone, epochs=3):
    net, optimizer = planned(**options)
    parallel = DistributedDataParallel(net)
    reference, alone = planned(**options, process_group=dist.new_subgroups(1)[0])
    for epoch in range(epochs):
        for opt in (optimizer, alone):
            opt.resample(epoch)
        for batch in toy_batches(2, size=8):
            train_parallel(parallel, optimizer, batch)
            train_alone(reference, alone, batch)
    assert_same(net, reference)


def one_step(net, optimizer, batch):
    optimizer.zero_grad()
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()


def check_joined_batch():
    for options in KINDS:
        train_both(options, lambda net, opt, batch: one_step(net, opt, own(batch)), one_step)


def check_accumulation():
    """Three micro-batches, the last one shorter, in no_sync but for the last; and without no_sync."""

    def accumulate(uses_no_sync):
        def train(net, optimizer, batch):
            optimizer.zero_grad()
            x, y = own(batch)
            for i, part in enumerate((slice(0, 2), slice(2, 3), slice(3, 4))):
                context = net.no_sync() if uses_no_sync and i < 2 else torch.enable_grad()
                with context:
                    (F.cross_entropy(net(x[part]), y[part], reduction="sum") / len(y)).backward()
            with Sent() as sent:
                optimizer.step()
            assert len(sent.sizes) <= 2  # never between micro-batches; the first is the agreement, once a draw

        return train

    for uses_no_sync in (True, False):
        train_both({"momentum": 0.9}, accumulate(uses_no_sync), one_step)


def check_clipping_after_synchronize():
    def clipped(is_parallel):
        def train(net, optimizer, batch):
            optimizer.zero_grad()
            x, y = own(batch) if is_parallel else batch
            F.cross_entropy(net(x), y).backward()
            optimizer.synchronize()
            clip_grad_norm_(trained(optimizer), 0.05)
            optimizer.step()

        return train

    train_both({}, clipped(True), clipped(False))


def check_loops_that_cannot_synchronize():
    """Unscaling and clipping between the last backward and the step, in two micro-batches, as others' loops do."""

    def train(net, optimizer, batch):
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        x, y = own(batch) if isinstance(net, DistributedDataParallel) else batch
        for part in (slice(0, len(y) // 2), slice(len(y) // 2, None)):
            scaler.scale(F.cross_entropy(net(x[part]), y[part]) / 2).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(trained(optimizer), 0.05)
        scaler.step(optimizer)

    train_both({"momentum": 0.9, "average_at": "backward"}, train, train)


def check_uneven_samples():
    """The last batch has 5 samples here and 3 there: the mean over ranks needs the losses weighted."""

    def train(net, optimizer, batch):
        optimizer.zero_grad()
        x, y = own(batch, 5)
        (F.cross_entropy(net(x), y) * len(y) * dist.get_world_size() / len(batch[1])).backward()
        optimizer.step()

    train_both({}, train, one_step)


def check_join():
    """The second process has one batch less: torch's Join, with the optimizer beside the model."""
    for options in KINDS[:2]:
        net, optimizer = planned(**options)
        parallel = DistributedDataParallel(net)
        optimizer.resample(0)
        *batches, after = toy_batches(4, size=4)
        batches = batches[: 3 - dist.get_rank()]
        with Join([parallel, optimizer]):
            for batch in batches:
                one_step(parallel, optimizer, own(batch))
        one_step(parallel, optimizer, own(after))
        reference, alone = planned(**options, process_group=dist.new_subgroups(1)[0])
        alone.resample(0)
        for i, (x, y) in enumerate(toy_batches(4, size=4)):
            if i != 2:
                one_step(reference, alone, (x, y))
            else:  # the missing half counts as a gradient of zero
                alone.zero_grad()
                (F.cross_entropy(reference(x[:2]), y[:2]) / 2).backward()
                alone.step()
        assert_same(net, reference)
    net, optimizer = planned()
    optimizer.resample(0)
    with Join([optimizer]):  # no other averages
        for batch in batches:
            one_step(net, optimizer, batch)


def check_join_of_draws_by_gradients_seen():
    """The second process has two batches less, and yet makes the draws of the first."""
    net, optimizer = planned(sampler="medyate", resample_every=2, max_grad_norm=0.05)
    parallel = DistributedDataParallel(net)
    with Join([parallel, optimizer]):
        for batch in toy_batches(7, size=4)[: 7 - 2 * dist.get_rank()]:
            one_step(parallel, optimizer, own(batch))
    assert optimizer.epoch == 3
    draws = [None, None]
    dist.all_gather_object(draws, [slot.channels.tolist() for slot in optimizer._all_slots()])
    assert draws[0] == draws[1]


def check_samplers_that_go_by_gradients_seen():
    train_both({"sampler": "medyate"}, lambda net, opt, batch: one_step(net, opt, own(batch)), one_step)


def check_draws_by_step():
    net, optimizer = planned(resample_every=2)
    parallel = DistributedDataParallel(net)
    reference, alone = planned(resample_every=2, process_group=dist.new_subgroups(1)[0])
    for batch in toy_batches(5, size=8):
        one_step(parallel, optimizer, own(batch))
        one_step(reference, alone, batch)
    assert optimizer.epoch == alone.epoch == 2
    assert_same(net, reference)


def check_bytes():
    net, optimizer = planned()
    parallel = DistributedDataParallel(net)
    optimizer.resample(0)
    one_step(parallel, optimizer, own(toy_batches(size=8)[0]))
    with Sent() as sent:
        one_step(parallel, optimizer, own(toy_batches(size=8)[0]))
    compact = sum(slot.proxy.numel() * 8 for slot in optimizer._all_slots())
    assert sent.sizes == [compact], (sent.sizes, compact)
    mixed = [torch.zeros(2, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.float64)]
    with Sent() as sent:
        average_gradients_(mixed, None)
    assert sorted(sent.sizes) == [8, 32]  # one for each dtype


def check_disagreement():
    for seed, epoch in ((dist.get_rank(), 0), (0, 1 + dist.get_rank())):
        net, optimizer = planned(seed)
        if epoch > 0:  # they agreed before
            optimizer.resample(0)
            one_step(net, optimizer, toy_batches()[0])
            optimizer.zero_grad()
        optimizer.resample(epoch)
        F.cross_entropy(net(toy_batches()[0][0]), toy_batches()[0][1]).backward()
        before = [parameter.clone() for parameter in net.parameters()]
        with pytest.raises(RuntimeError, match="do not train the same channels"):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def check_gradients_used_too_early():
    net, optimizer = planned()
    optimizer.resample(0)
    x, y = own(toy_batches(size=8)[0])
    F.cross_entropy(net(x), y).backward()
    clip_grad_norm_(trained(optimizer), 0.1)
    with pytest.raises(RuntimeError, match="before they were averaged"):
        optimizer.step()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    with pytest.raises(RuntimeError, match="before they were averaged"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.synchronize()
    F.cross_entropy(net(x), y).backward()
    with pytest.raises(RuntimeError, match="a backward ran after synchronize"):
        optimizer.step()


def check_averages_are_used_up():
    net, optimizer = planned()
    optimizer.synchronize()  # nothing is drawn yet
    optimizer.resample(0)
    (x, y), *_ = toy_batches()
    F.cross_entropy(net(x), y).backward()
    optimizer.synchronize()
    optimizer.zero_grad()
    for _ in range(2):  # the second backward adds to the averages of the first
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()


def check_a_backward_that_failed_leaves_nothing_to_wait_for():
    net, optimizer = planned(average_at="backward")
    optimizer.resample(0)
    x, y = own(toy_batches(size=8)[0])
    last = x.clone().requires_grad_()
    last.register_hook(lambda grad: grad[len(y)])
    with pytest.raises(IndexError):
        F.cross_entropy(net(last), y).backward()
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    clip_grad_norm_(trained(optimizer), 0.05)  # of averages, or else step() refuses
    optimizer.step()


def check_infinities_of_one_process_stop_all():
    for average_at in ("step", "backward"):
        all_stop(average_at)


def all_stop(average_at):
    net, optimizer = planned(average_at=average_at)
    parallel = DistributedDataParallel(net)
    optimizer.resample(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = own(toy_batches(size=8)[0])
    before = [parameter.clone() for parameter in net.parameters()]
    if dist.get_rank() == 1:
        proxy = next(p for p in trained(optimizer)[2:] if p.numel())
        proxy.register_hook(lambda grad: grad * float("inf"))
    with Sent() as sent:
        scaler.scale(F.cross_entropy(parallel(x), y)).backward()
    assert len(sent.sizes) == (0 if average_at == "step" else 2)  # the agreement, and once for all layers
    if average_at == "step":
        optimizer.synchronize()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="gradients of the parameters that are trained whole")
    dist.init_process_group("gloo")
    for name, check in list(globals().items()):
        if name.startswith("check_") and (len(sys.argv) == 1 or name in sys.argv[1:]):
            check()
            print(name, "passed", flush=True)
    dist.destroy_process_group()
