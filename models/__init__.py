"""What the library knows of timm: its layer types, the paper's nets that it lacks, their weights and schemes."""

import timm.layers
from timm import create_model, list_models

from trady_triton.models import paper_nets as paper_nets  # registers the nets with timm
from trady_triton.models.layers import LeanConv2dSame
from trady_triton.models.norm import LeanBatchNormAct2d
from trady_triton.models.schemes import su_layers
from trady_triton.models.weights import load_folded_weights
from trady_triton.nn import register_lean

register_lean(timm.layers.Conv2dSame, LeanConv2dSame)
register_lean(timm.layers.BatchNormAct2d, LeanBatchNormAct2d)

__all__ = ["create_model", "list_models", "load_folded_weights", "su_layers"]
