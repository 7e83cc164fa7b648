"""What the library knows of timm: the paper's nets (registered with it on import), their weights and schemes."""

from timm import create_model, list_models
from trady_triton.models import paper_nets as paper_nets
from trady_triton.models.schemes import su_layers
from trady_triton.models.weights import load_folded_weights

__all__ = ["create_model", "list_models", "load_folded_weights", "su_layers"]
