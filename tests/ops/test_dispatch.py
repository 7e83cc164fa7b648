"""One place decides between kernel and twin, and says so clearly where the kernel cannot run."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trady_triton.ops import dispatch, token_wgrad
from trady_triton.ops.upload import upload


@pytest.mark.parametrize(("backend", "expected"), [("auto", False), ("torch", False), ("triton", True)])
def test_the_backend_on_cpu_tensors(backend, expected, monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", backend)
    assert dispatch.use_triton(torch.ones(1)) is expected


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"'cuda', wanted one of auto, triton, torch"):
        dispatch.use_triton(torch.ones(1))


def test_kernels_on_the_cpu_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        dispatch.use_triton(torch.ones(1))


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_that_triton_does_not_know_gets_the_twins(capability, expected, monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dispatch._runs_kernels.cache_clear()
    with FakeTensorMode():
        assert dispatch.use_triton(torch.empty(1, device="cuda")) is expected
    dispatch._runs_kernels.cache_clear()


def test_the_torch_backend_launches_no_kernel(monkeypatch):
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "torch")
    monkeypatch.setattr(importlib.import_module("trady_triton.ops.token_wgrad"), "launch", None)
    assert token_wgrad(torch.ones(2, 5), torch.ones(5, 3)).tolist() == [[5.0] * 3] * 2


def test_deterministic_algorithms_override_the_request(monkeypatch):
    assert dispatch.deterministic(True)
    assert not dispatch.deterministic(False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert dispatch.deterministic(False)


def test_everything_runs_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
import importlib, pkgutil, trady_triton.ops
for module in pkgutil.iter_modules(trady_triton.ops.__path__):
    importlib.import_module(f"trady_triton.ops.{module.name}")
from trady_triton.ops.token_wgrad import token_wgrad
assert token_wgrad(torch.ones(2, 5), torch.ones(5, 3)).sum() == 30
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON", "TRADY"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tables_of_a_fake_model_are_fake_on_its_device():
    with FakeTensorMode():
        assert upload([1, 2], torch.int64, torch.device("cuda")).device.type == "cuda"
