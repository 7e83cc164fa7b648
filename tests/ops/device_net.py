"""A small planned net on a device, of every kind of layer that has a kernel, and one training step of it."""

import torch
import torch.nn.functional as F
from torch import nn

from trady_triton import TraDyOptimizer, apply_plan, make_plan, rank_layers


def planned_net(store="same", algorithm="sgd", device="cuda"):
    """(net, optimizer, (x, y)); one epoch's channels are drawn."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU6(), nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.Hardswish(),
        nn.Conv2d(24, 40, 1), nn.ReLU(), nn.Conv2d(40, 48, 3, 2, 1, groups=4), nn.Flatten(2), nn.Linear(49, 33),
        nn.GELU(), nn.Flatten(), nn.Linear(48 * 33, 10),
    ).to(device)  # fmt: skip
    x, y = torch.randn(4, 3, 28, 28, device=device), torch.arange(4, device=device)
    ranking = rank_layers(net, [(x, y)], F.cross_entropy, head=["11"])
    plan = make_plan(ranking, budget="1MiB", coverage=1.0, batch_size=4, store=store, optimizer=algorithm)
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, algorithm=algorithm)
    optimizer.resample(0)
    return net, optimizer, (x, y)


def backward(net, x, y):
    """The gradients of a batch, in bfloat16 autocast."""
    with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
        loss = F.cross_entropy(net(x), y)
    loss.backward()


def step(net, optimizer, x, y):
    """A whole training step."""
    optimizer.zero_grad()
    backward(net, x, y)
    optimizer.step()


if __name__ == "__main__":  # for compute-sanitizer
    for kind in ("same", "int8", "int4"):
        net, optimizer, batch = planned_net(kind)
        step(net, optimizer, *batch)
    torch.cuda.synchronize()
