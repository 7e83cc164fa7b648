"""`make bench`: FLOPs, memory and time of a training step, TraDy against everything that could be picked instead."""
