"""What TraDyOptimizer is made of: groups and states, gradients, updates, scores, processes, meter."""
