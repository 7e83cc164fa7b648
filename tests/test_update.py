"""The fused update of many slots: kernel and torch twin agree, launch tables are kept within a draw and no longer."""

import pytest
import torch
from torch import nn

from trady_triton.ops import dispatch
from trady_triton.optim import update
from trady_triton.optim.states import fill_channel_state
from trady_triton.optim.update import ChannelUpdate, Trained
from trady_triton.slot import ChannelSlot

SGD = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "nesterov": False}
ADAMW = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}
GROUPS = {
    "sgd": [{**SGD, "momentum": 0.0}, {**SGD, "lr": 0.05, "nesterov": True}, SGD],
    "adamw": [ADAMW, {**ADAMW, "betas": (0.7, 0.99), "lr": 0.05}, ADAMW],
}


def make_slots():
    generator = torch.Generator().manual_seed(0)
    shapes = [((6, 8), 1), ((8, 4, 3, 3), 2), ((8, 1, 3, 3), 8)]
    weights = [nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False) for shape, _ in shapes]
    return [ChannelSlot(str(i), w, g, "plan") for i, (w, (_, g)) in enumerate(zip(weights, shapes, strict=True))]


def run(algorithm, draws):
    """Weights and states after two steps with each of the draws, each slot under its own options."""
    slots, step, generator = make_slots(), ChannelUpdate(algorithm), torch.Generator().manual_seed(1)
    for channels in draws:
        trained = []
        for slot, group in zip(slots, GROUPS[algorithm], strict=True):
            slot.set(channels)
            trained.append(Trained(slot, fill_channel_state({}, slot, algorithm, group), group))
        for _ in range(2):
            for slot in slots:
                slot.proxy.grad = torch.randn(slot.proxy.shape, generator=generator)
            step(trained)
    return [slot.weight for slot in slots] + [value for item in trained for value in item.state.values()]


@pytest.mark.skipif(not dispatch.INTERPRET, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("algorithm", GROUPS)
def test_kernel_and_twin_agree_and_tables_serve_a_whole_draw(algorithm, monkeypatch):
    draws = [(0, 3, 5), (1, 2), (4,)]
    expected = run(algorithm, draws)
    built = []
    real = update.update_tables
    monkeypatch.setattr(update, "update_tables", lambda *tensors: built.append(1) or real(*tensors))
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "triton")
    launches = 3 if algorithm == "sgd" else 1  # no momentum, nesterov, momentum; AdamW takes all options in one
    for tensor, reference in zip(run(algorithm, draws), expected, strict=True):
        torch.testing.assert_close(tensor, reference, rtol=1e-5, atol=1e-6)
    assert len(built) == launches * len(draws)
