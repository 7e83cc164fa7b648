"""Training steps on a pretended CUDA device: no launch that a device would refuse, and nothing that waits for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine import run_backward
from torch import nn

DRY_RUN = Path(__file__).with_name("dry_run.py")


def dry_run(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(DRY_RUN.parents[2])}
    environment.pop("TRADY_TRITON_BACKEND", None)
    done = subprocess.run([sys.executable, DRY_RUN, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.aot
def test_two_nets_run_and_their_kernels_compile():
    dry_run("--ci")


@pytest.mark.aot
@pytest.mark.slow
def test_every_net_runs_and_every_variant_compiles_without_spills():
    dry_run()


def test_the_backward_in_python_is_that_of_torch(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)

    def gradients():
        y = net(x)
        inner = torch.autograd.grad(y.sin().sum(), y, retain_graph=True)[0]
        grads = torch.autograd.grad((y + y.float() * inner).square().sum(), [x, *net.parameters()])
        net.zero_grad()
        y = net(x)
        (y * y[:1]).sum().backward()
        return [*grads, *(parameter.grad for parameter in net.parameters())]

    expected = [grad.clone() for grad in gradients()]
    net.zero_grad()
    x.grad = None
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", run_backward)
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert torch.equal(ours, theirs)
