"""The policy as part of the plan: checked, saved, told apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trady_triton.cost import CostModel, LayerShape
from trady_triton.plan import Plan
from trady_triton.policy import Policy

PLAN = Plan({"a": LayerShape(4, 4, 9, 9, 9)}, ("a",), ("head",), 100, CostModel())


@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        Policy("eval", 8, "recompute", ("blocks.0", "blocks.1")),
        Policy("train"),
        Policy("affine"),
        Policy(activations=2),
    ],
)
def test_a_saved_plan_comes_back_with_its_policy(policy, tmp_path):
    plan = replace(PLAN, policy=policy)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_plans_of_other_policies_have_other_fingerprints():
    policies = [
        Policy(),
        Policy(batch_norm="train"),
        Policy(activations=8),
        Policy(attention="recompute"),
        Policy(recompute=("a",)),
    ]
    assert len({replace(PLAN, policy=policy).fingerprint for policy in policies}) == len(policies)


@pytest.mark.parametrize(
    "wrong",
    [
        {"activations": 4},
        {"activations": True},
        {"batch_norm": "off"},
        {"attention": 1},
        {"recompute": "blocks.0"},
        {"recompute_parts": 0},
        {"recompute_parts": 1.5},
    ],
)
def test_an_unknown_choice_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Policy(**wrong)


def test_statistics_that_a_second_run_would_update_again_are_refused():
    with pytest.raises(ValueError, match="running statistics"):
        Policy(batch_norm="train", recompute=("blocks.0",))


def test_only_exact_activations_are_exact():
    assert Policy(attention="recompute", recompute=("a",)).is_exact
    assert not Policy(activations=8).is_exact
