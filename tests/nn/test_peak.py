"""A training step needs no more memory than inference: live storages beyond weights and input, on fake tensors."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import fake_net, plan_at, random_net
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trady_triton import apply_plan, choose_recompute

SHAPE = (8, 3, 224, 224)
BARS = {  # step over inference
    "mobilenetv2_100": 1.05,
    "resnet50": 1.05,
    "ghostnet_100": 1.05,
    "swin_tiny_patch4_window7_224": 1.05,
    "convnext_tiny": 1.05,
    "coatnet_0_rw_224": 1.05,
    "mixer_s16_224": 1.5,
    "vit_small_patch16_224": 1.6,
    "eva02_tiny_patch14_224": 1.6,
}


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of every storage from its first appearance until it is freed."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.live -= nbytes


def peak_bytes(model: nn.Module, x: Tensor, train: bool) -> int:
    with LiveStorage(*model.parameters(), *model.buffers(), x) as meter, torch.set_grad_enabled(train):
        y = model(x)
        if train:
            F.cross_entropy(y, torch.zeros(len(x), dtype=torch.long)).backward()
    return meter.peak


@pytest.mark.parametrize(("name", "bar"), BARS.items())
def test_a_step_peaks_as_inference_does(name, bar):
    plain = random_net(name, torch.float32)
    with fake_net(plain) as fake:
        x = torch.empty(SHAPE)
        inference, plan = peak_bytes(fake, x, train=False), plan_at(fake, x, (0.25,))
    plan = choose_recompute(replace(plan, budget=2 * plan.cost.channel_cost(plan.shapes[plan.pool[0]])), plain, SHAPE)
    with fake_net(plain) as fake:
        apply_plan(fake, plan)
        fake.get_submodule(plan.pool[0]).slot.set((0, 1))
        step = peak_bytes(fake, torch.empty(SHAPE), train=True)
    assert step <= bar * inference, f"{step / 2**20:.1f} MiB / {inference / 2**20:.1f} MiB"
