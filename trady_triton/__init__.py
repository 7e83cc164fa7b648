"""Fine-tune pretrained networks inside a strict memory budget (TraDy)."""
