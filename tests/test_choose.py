"""What choose_recompute picks: fewest bytes at the lowest peak, and nothing that cannot run twice."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nn.nets import plan_at, random_net, shapes_in_order
from torch import Tensor, nn

from trady_triton import Policy, apply_plan, choose_recompute, ledger
from trady_triton.cost import CostModel, measure_call
from trady_triton.plan import Plan


class Block(nn.Module):
    """A residual MLP, whose working set is many times its input."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Doubles(Block):
    """A block that changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


def stack(*blocks: nn.Module) -> tuple[nn.Module, Plan]:
    """The blocks after a trained Linear(16, 16), and a plan for batches [N, 16]."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), *blocks, nn.Linear(16, 5)).double()
    shapes = {"0": measure_call(net[0], torch.zeros(1, 16), torch.zeros(1, 16), 1)}
    return net, Plan(shapes, ("0",), (str(len(net) - 1),), 10**6, CostModel())


def chosen(plan: Plan, net: nn.Module, samples: int) -> tuple[tuple[str, ...], int]:
    policy = choose_recompute(plan, net, (samples, 16)).policy
    return policy.recompute, policy.recompute_parts


def gradient(net: nn.Module, plan: Plan, x: Tensor) -> Tensor:
    net = apply_plan(copy.deepcopy(net), plan)
    net[0].slot.set(range(16))
    F.cross_entropy(net(x), torch.arange(len(x)) % 5).backward()
    return net[0].slot.proxy.grad


class Counts(Block):
    """A block with a counter that it replaces at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


def test_units_that_change_their_input_never_run_twice():
    net, plan = stack(Block(), Doubles(), Block(), Doubles())
    plan = choose_recompute(plan, net, (8, 16))
    starts = [int(name.split(":")[0]) for name in plan.policy.recompute if name[0].isdigit() and "." not in name]
    assert plan.policy.recompute
    assert not {2, 4} & set(starts)
    x = torch.randn(8, 16, dtype=torch.float64)
    bare = gradient(net, replace(plan, policy=Policy()), x)
    torch.testing.assert_close(gradient(net, plan, x), bare, rtol=1e-10, atol=1e-12)


def test_parts_are_as_many_as_the_peak_asks_for_and_the_batch_allows():
    net, plan = stack(*(Block() for _ in range(6)))
    parts = {samples: chosen(plan, net, samples)[1] for samples in (1, 7, 1024)}
    assert parts == {1: 1, 7: 1, 1024: 4}
    assert chosen(replace(plan, policy=Policy(recompute_parts=8)), net, 1024)[1] == 8


def test_no_parts_are_made_where_samples_see_each_other():
    net, plan = stack(*(Block(nn.BatchNorm1d(16, track_running_stats=False)) for _ in range(6)))
    units, parts = chosen(plan, net, 1024)
    assert units
    assert parts == 1


def test_nothing_runs_twice_that_would_count_its_batch_twice():
    net, plan = stack(*(Block(nn.BatchNorm1d(16)) for _ in range(6)))
    assert chosen(plan, net, 64)[0]
    assert chosen(replace(plan, policy=Policy(batch_norm="train", recompute=())), net, 64) == ((), 1)


def test_nothing_runs_twice_that_counts_its_calls():
    net, plan = stack(*(Counts() for _ in range(6)))
    net = apply_plan(net, choose_recompute(plan, net, (64, 16)))
    net[0].slot.set(range(16))
    net(torch.randn(64, 16, dtype=torch.float64)).sum().backward()
    assert {int(block.calls) for block in net if isinstance(block, Counts)} == {1}


def test_a_net_that_keeps_masks_alone_recomputes_nothing():
    net = random_net("mobilenetv2_035", torch.float32)
    plan = plan_at(net, torch.zeros(2, 3, 64, 64), (0.25,))
    assert choose_recompute(plan, net, (2, 3, 64, 64)).policy == Policy()


@pytest.mark.parametrize(
    ("name", "options", "policy"),
    [
        ("convnext_atto", {}, Policy()),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 4}, Policy()),
        ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 4}, Policy(attention="recompute", activations=8)),
    ],
)
def test_a_choice_keeps_no_more_and_peaks_no_higher(name, options, policy):
    net, size = random_net(name, torch.float32, **options), options.get("img_size", 64)
    shape = (3, 3, size, size)
    plan = plan_at(net, torch.zeros(shape), (0.1, 0.5), policy=policy)
    before, after = (ledger(net, made, shape) for made in (plan, choose_recompute(plan, net, shape)))
    assert after.kept_bytes < before.kept_bytes
    assert after.peak_bytes <= 1.05 * max(before.peak_bytes, before.inference_bytes)


def test_packing_keeps_no_more_than_what_is_exact():
    """Packed, these blocks keep little that a second forward would spare, but more than the exact choice."""
    blocks = (nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.SiLU()) for _ in range(6))
    net, plan = stack(*blocks)
    policies = Policy(), Policy(activations=8)
    exact, packed = (choose_recompute(replace(plan, policy=policy), net, (8, 16)) for policy in policies)
    assert exact.policy.recompute
    assert ledger(net, packed, (8, 16)).kept_bytes <= ledger(net, exact, (8, 16)).kept_bytes


def test_masks_and_what_the_budget_pays_for_are_not_worth_a_second_forward():
    net = random_net("mobilenetv2_100", torch.float32)
    shapes = shapes_in_order(net, torch.zeros(1, 3, 128, 128))
    cost = CostModel(8, 4, 4, "bytes")
    plan = Plan(shapes, tuple(shapes)[-16:], ("classifier",), 2**20, cost)
    assert sum(plan.sample(0).values(), ())
    assert choose_recompute(plan, net, (8, 3, 128, 128)).policy.recompute == ()
