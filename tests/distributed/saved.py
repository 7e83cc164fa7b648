"""Saving and loading with torch.distributed.checkpoint, alike in one process and in many."""

import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from toys import toy_net, toy_plan

from trady_triton import TraDyOptimizer, apply_plan

ADAMW = {"algorithm": "adamw", "weight_decay": 0.1}


def planned(**options):
    net = toy_net()
    plan = toy_plan(net, 1200)
    apply_plan(net, plan)
    return net, TraDyOptimizer(net.parameters(), plan, lr=0.05, **options)


def train(net, optimizer, batch):
    optimizer.zero_grad()
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()


def save(net, optimizer, folder):
    model, optim = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=folder)


def load(net, optimizer, folder):
    """The channels of the checkpoint must be drawn: DCP loads into the tensors that are there."""
    model, optim = get_state_dict(net, optimizer)
    state = {"model": model, "optim": optim}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
