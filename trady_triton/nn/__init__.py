"""Lean modules: layers that keep for the backward only what the plan trains."""

from torch import nn

from trady_triton.nn.conv import LeanConv2d
from trady_triton.nn.convert import AppliedPlan, apply_plan, remove_plan
from trady_triton.nn.linear import LeanLinear
from trady_triton.registry import register_lean

register_lean(nn.Conv2d, LeanConv2d)
register_lean(nn.Linear, LeanLinear)

__all__ = ["AppliedPlan", "LeanConv2d", "LeanLinear", "apply_plan", "register_lean", "remove_plan"]
