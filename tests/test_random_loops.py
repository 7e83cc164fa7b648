"""Loops in any order: random calls of backward, step, zero_grad, resample and load, against masked dense autograd."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from test_optimizer import drawn_mask
from toys import toy_batches, toy_net, toy_plan

from trady_triton import TraDyOptimizer, apply_plan

LR, MOMENTUM, DECAY = 0.05, 0.9, 0.1
CALLS = ("backward", "backward", "step", "step", "zero_grad", "clear in place", "draw", "draw again", "drop", "reload")
PLAN = toy_plan(toy_net(), 800)
BATCHES = toy_batches(4)


class Masked:
    """SGD with momentum on all gradients of a dense network; moves and keeps state of what is drawn alone."""

    def __init__(self, policy):
        self.net, self.policy, self.epoch = toy_net(), policy, None
        self.weights = {name: self.net.get_submodule(name).weight for name in PLAN.pool}
        self.masks = {parameter: torch.ones_like(parameter) for parameter in self.net.head.parameters()}
        self.momenta = {}

    def draw(self, epoch):
        if epoch == self.epoch:
            return
        self.epoch = epoch
        for name, weight in self.weights.items():
            self.masks[weight] = drawn_mask(self.net, name, PLAN.sample(epoch)[name]).double()
            if weight in self.momenta:
                self.momenta[weight] *= self.masks[weight] if self.policy == "carry" else 0
        self.forget_compact()

    def forget_compact(self):
        for weight in self.weights.values():
            weight.grad = None

    @torch.no_grad()
    def step(self):
        for parameter, mask in self.masks.items():
            if parameter.grad is not None:
                grad = (parameter.grad + DECAY * parameter) * mask
                self.momenta[parameter] = MOMENTUM * self.momenta.get(parameter, torch.zeros_like(grad)) + grad
                parameter -= LR * self.momenta[parameter]


class Loop:
    """The planned network and its optimizer, beside the masked one; every call goes to both."""

    def __init__(self, policy):
        self.policy, self.count, self.waits = policy, 0, False
        self.net, self.dense = apply_plan(toy_net(), PLAN), Masked(policy)
        self.optimizer = self.made(self.net)
        self.draw(0)

    def made(self, net):
        return TraDyOptimizer(net.parameters(), PLAN, LR, DECAY, momentum=MOMENTUM, state_policy=self.policy)

    def draw(self, epoch):
        if self.waits and epoch != self.dense.epoch:
            with pytest.raises(RuntimeError, match="gradients wait for step"):
                self.optimizer.resample(epoch)
        else:
            self.optimizer.resample(epoch)
            self.dense.draw(epoch)

    def backward(self):
        x, y = BATCHES[self.count % len(BATCHES)]
        self.count += 1
        for net in (self.net, self.dense.net):
            F.cross_entropy(net(x), y).backward()
        self.waits = True

    def clear(self, set_to_none):
        for optimizer in (self.optimizer, self.dense.net):
            optimizer.zero_grad(set_to_none)
        self.waits = False

    def step(self):
        self.optimizer.step()
        self.dense.step()
        self.waits = False

    def reload(self):
        """Both states into another network and optimizer, which lose the gradients."""
        state = copy.deepcopy(self.optimizer.state_dict())
        net = apply_plan(toy_net(seed=1), PLAN)
        net.load_state_dict(self.net.state_dict())
        self.net, self.optimizer = net, self.made(net)
        self.optimizer.load_state_dict(state)
        self.clear(True)

    def call(self, name):
        {
            "backward": self.backward,
            "step": self.step,
            "zero_grad": lambda: self.clear(True),
            "clear in place": lambda: self.clear(False),
            "draw": lambda: self.draw(self.dense.epoch + 1),
            "draw again": lambda: self.draw(self.dense.epoch),
            "drop": lambda: self.net(BATCHES[0][0]),
            "reload": self.reload,
        }[name]()


@pytest.mark.parametrize("policy", ["carry", "reset"])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_calls_equals_dense_autograd_on_what_is_drawn(seed, policy):
    loop = Loop(policy)
    for name in random.Random(seed).choices(CALLS, k=100):
        loop.call(name)
    for name, tensor in loop.net.state_dict().items():
        torch.testing.assert_close(tensor, loop.dense.net.state_dict()[name], rtol=1e-9, atol=1e-11)
