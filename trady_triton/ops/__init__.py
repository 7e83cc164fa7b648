"""Kernels with a torch twin each: compact stores, sparse weight gradients, fused updates, packed derivatives."""
