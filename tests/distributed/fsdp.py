"""`fully_shard` on two processes, against one process on the joined batch; checkpoints between one and two processes.

Run by torchrun, with a folder that holds the checkpoint of one process and gets that of two.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed.ddp import KINDS, assert_same, own
from distributed.saved import ADAMW, load, planned, save, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from toys import toy_batches, toy_net, toy_plan

from trady_triton import TraDyOptimizer, apply_plan
from trady_triton.optim.scores import ChannelScores


def sharded(**options):
    """As `planned`, with every weight on two processes: first fully_shard, then apply_plan."""
    net = toy_net()
    plan = toy_plan(net, 1200)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard([net.depthwise, net.grouped], mesh=mesh)
    fully_shard(net, mesh=mesh)
    apply_plan(net, plan)
    return net, TraDyOptimizer(net.parameters(), plan, lr=0.05, **options)


def whole(net):
    state = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in net.state_dict().items()}
    twin = toy_net()
    twin.load_state_dict(state)
    return twin


def step_of_half(net, optimizer, batch):
    optimizer.zero_grad()
    x, y = own(batch)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()


def check_joined_batch(folder):
    for options in KINDS:
        net, optimizer = sharded(**options)
        reference, alone = planned(**options, process_group=dist.new_subgroups(1)[0])
        assert isinstance(net.stem.weight, DTensor)
        for epoch in range(3):
            optimizer.resample(epoch)
            alone.resample(epoch)
            for batch in toy_batches(2, size=8):
                step_of_half(net, optimizer, batch)
                train(reference, alone, batch)
        assert_same(whole(net), reference)


def check_accumulation(folder):
    net, optimizer = sharded(momentum=0.9)
    reference, alone = planned(momentum=0.9, process_group=dist.new_subgroups(1)[0])
    for epoch in range(2):
        optimizer.resample(epoch)
        alone.resample(epoch)
        batch = toy_batches(size=8)[0]
        optimizer.zero_grad()
        x, y = own(batch)
        for part in (slice(0, 3), slice(3, 4)):
            net.set_requires_gradient_sync(part.stop == 4)
            (F.cross_entropy(net(x[part]), y[part], reduction="sum") / len(y)).backward()
        optimizer.step()
        train(reference, alone, batch)
    assert_same(whole(net), reference)


def check_mixed_precision(folder):
    """FSDP2's own policy: bf16 weights in forward and backward, float32 shards, compact gradients in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    optimizers = []
    for is_sharded in (True, False):
        net = toy_net(torch.float32)
        net.norm = nn.Identity()  # torch has no batch_norm of bf16 weights and float32 statistics
        plan = toy_plan(net, 1200)
        if is_sharded:
            fully_shard(net, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
        apply_plan(net, plan)
        optimizers.append(TraDyOptimizer(net.parameters(), plan, lr=0.05))
        optimizers[-1].resample(0)
        x, y = toy_batches(dtype=torch.float32)[0]
        F.cross_entropy(net(x).float(), y).backward()
    compared = 0
    for slot, wanted in zip(*(optimizer._all_slots() for optimizer in optimizers), strict=True):
        if slot.proxy.grad is not None:
            assert slot.proxy.grad.dtype == torch.float32
            assert (slot.proxy.grad - wanted.proxy.grad).norm() < 0.1 * wanted.proxy.grad.norm()
            compared += 1
    assert compared > 2


def check_norms_of_whole_weights(folder):
    _net, optimizer = sharded()  # FSDP wants the model to live
    _, alone = planned(process_group=dist.new_subgroups(1)[0])
    norms = []
    for opt in (optimizer, alone):
        scores = ChannelScores(opt.plan)
        scores.source = "weights"
        norms.append(scores.following(opt._all_slots(), None))
    assert all(torch.allclose(norms[0][name], norms[1][name]) for name in optimizer.plan.pool)


def check_the_wrong_order_is_named(folder):
    net = toy_net()
    apply_plan(net, plan := toy_plan(net))
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="fully_shard comes before apply_plan"):
        TraDyOptimizer(net.parameters(), plan)


def check_checkpoint_of_one_process(folder):
    net, optimizer = sharded(**ADAMW)
    optimizer.resample(1)
    load(net, optimizer, folder / "one")
    step_of_half(net, optimizer, toy_batches(size=8)[0])
    save(net, optimizer, folder / "two")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check(Path(sys.argv[1]))
            print(name, "passed", flush=True)
    dist.destroy_process_group()
