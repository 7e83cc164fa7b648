"""What the library knows of timm: its layer types and registries, the paper's nets, their weights and schemes."""

from timm import create_model, list_models

from trady_triton.models import lean_types as lean_types  # teaches timm's layer types
from trady_triton.models import optim as optim  # registers the optimizer with timm
from trady_triton.models import paper_nets as paper_nets  # registers the nets with timm
from trady_triton.models.schemes import su_layers
from trady_triton.models.shipped import how_made, ranking_for
from trady_triton.models.weights import load_folded_weights

__all__ = ["create_model", "how_made", "list_models", "load_folded_weights", "ranking_for", "su_layers"]
