"""accelerate: `prepare`, accumulation, clipping and state."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate", reason="accelerate is not installed (extra hf)")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from integrations.twin import hand_written
from toys import toy_batches, toy_net, toy_plan

from trady_triton import TraDyOptimizer, apply_plan
from trady_triton.integrations.accelerate import unwrap_optimizer


@pytest.fixture
def accelerator():
    """A fresh Accelerator: its state is global otherwise."""

    def make(**options):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        return Accelerator(cpu=True, **options)

    yield make
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def prepared(accelerator, plan, momentum=0.0):
    net = apply_plan(toy_net(), plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1, momentum=momentum)
    loader = torch.utils.data.DataLoader(toy_batches(4), batch_size=None)
    return accelerator.prepare(net, optimizer, loader)


def train(accelerator, model, optimizer, loader, epochs):
    for epoch in epochs:
        unwrap_optimizer(optimizer).resample(epoch)
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.5)
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_prepared_loop_equals_one_written_by_hand(accelerator, accumulate):
    plan = toy_plan(toy_net())
    helper = accelerator(gradient_accumulation_steps=accumulate)
    model, optimizer, loader = prepared(helper, plan)
    train(helper, model, optimizer, loader, range(2))
    expected = hand_written(plan, 4, accumulate, clip=0.5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_saved_state_is_loaded_with_its_channels(accelerator, tmp_path, momentum):
    plan = toy_plan(toy_net())
    helper = accelerator()
    whole = prepared(helper, plan, momentum)
    train(helper, *whole, range(2))
    helper.save_state(tmp_path)
    train(helper, *whole, range(1, 3))
    helper = accelerator()
    resumed = prepared(helper, plan, momentum)
    helper.load_state(tmp_path)
    assert unwrap_optimizer(resumed[1]).epoch == 1
    train(helper, *resumed, range(1, 3))
    state = whole[0].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in resumed[0].state_dict().items())


def test_preparing_after_a_draw_keeps_it(accelerator):
    plan = toy_plan(toy_net())
    net = apply_plan(toy_net(), plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    optimizer.resample(3)
    _, wrapped = accelerator().prepare(net, optimizer)
    assert unwrap_optimizer(wrapped) is optimizer
    assert optimizer.epoch == 3


def test_a_step_that_overflows_is_left_out_as_by_torch_s_fused_optimizers(accelerator):
    accelerator()
    planned, dense = toy_net(torch.float32), toy_net(torch.float32)
    ours = TraDyOptimizer(apply_plan(planned, toy_plan(planned)).parameters(), lr=0.1)
    ours.resample(0)
    x, y = toy_batches(dtype=torch.float32)[0]
    for net, optimizer in ((planned, ours), (dense, torch.optim.SGD(dense.parameters(), lr=0.1, fused=True))):
        before = copy.deepcopy(net.state_dict())
        wrapped = AcceleratedOptimizer(optimizer, scaler=torch.amp.GradScaler("cpu"))
        wrapped.scaler.scale(F.cross_entropy(net(x), y) * torch.inf).backward()
        wrapped.step()
        assert not wrapped.step_was_skipped
        assert wrapped.scaler.get_scale() == 2.0**15  # halved
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_another_optimizer_is_refused(accelerator):
    net = toy_net()
    wrapped = accelerator().prepare(torch.optim.SGD(net.parameters()))
    with pytest.raises(TypeError, match="optimizer of type SGD: wanted a TraDyOptimizer"):
        unwrap_optimizer(wrapped)
