"""The loop that other people's loops must equal, on the toy network."""

import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from toys import toy_batches, toy_net

from trady_triton import TraDyOptimizer, apply_plan


def hand_written(plan, batches, accumulate=1, clip=None, epochs=2):
    """The network after some epochs at learning rate 0.1."""
    net = apply_plan(toy_net(), plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    for epoch in range(epochs):
        optimizer.resample(epoch)
        for start in range(0, batches, accumulate):
            optimizer.zero_grad()
            for x, y in toy_batches(batches)[start : start + accumulate]:
                (F.cross_entropy(net(x), y) / accumulate).backward()
            if clip is not None:
                clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
            optimizer.step()
    return net
