"""Autograd's backward in Python, for tensors of a device that is not there: torch's engine would start its threads.

Nodes run in the order of torch's engine, and a gradient is cast and summed to what the node that takes it expects.
"""

from collections import Counter

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge


def run_backward(outputs, grads, keep_graph, create_graph, inputs, allow_unreachable=False, accumulate_grad=False):
    """Stands for torch.autograd's `_engine_run_backward`: fills `.grad`, or returns the gradients of `inputs`."""
    wanted = [get_gradient_edge(tensor)[:2] for tensor in inputs]
    found = {}
    arrived = {}  # node -> gradients of its outputs
    roots = [(get_gradient_edge(tensor)[:2], grad) for tensor, grad in zip(outputs, grads, strict=True)]
    missing = _edges_into([node for (node, _), _ in roots])
    for edge, grad in roots:
        _deliver(arrived, edge, grad)
    ready = [node for node in arrived if not missing[node]]
    with torch.set_grad_enabled(create_graph):
        while ready:
            ready.sort(key=lambda node: node._sequence_nr())
            node = ready.pop()
            grads = arrived.pop(node, [None] * len(node._input_metadata))
            found |= {edge: grads[edge[1]] for edge in wanted if edge[0] is node}
            is_leaf = node.name().endswith("AccumulateGrad")
            results = () if is_leaf and not accumulate_grad else _run(node, grads)
            for edge, grad in zip(_taken(node), results, strict=not is_leaf):
                if edge[0] is None:
                    continue
                if grad is not None:
                    _deliver(arrived, edge, grad)
                missing[edge[0]] -= 1
                if not missing[edge[0]]:
                    ready.append(edge[0])
    return tuple(found.get(edge) for edge in wanted)


def _edges_into(roots):
    """How many edges lead into each node that the roots lead to."""
    count, waiting, seen = Counter(), list(roots), set(roots)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                count[node] += 1
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
    return count


def _taken(node):
    return [] if node.name().endswith("AccumulateGrad") else node.next_functions


def _run(node, grads):
    """The gradients that a node hands on, one for each of its `next_functions`."""
    if all(grad is None for grad in grads):
        return [None] * len(node.next_functions)
    if isinstance(node, BackwardCFunction):
        full = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) if grad is None else grad
                for grad, m in zip(grads, node._input_metadata, strict=True)]  # fmt: skip
        results = node.apply(*full)
        results = results if isinstance(results, tuple) else (results,)
        needed = (g for g, needs in zip(results, node.needs_input_grad, strict=True) if needs)
        return [None if edge[0] is None else next(needed) for edge in node.next_functions]
    results = node(*grads)
    return results if isinstance(results, tuple) else (results,)


def _deliver(arrived, edge, grad):
    """Add a gradient to those that arrived at an edge, as the node expects it."""
    node, number = edge
    expected = node._input_metadata[number]
    assert grad.device == expected.device, f"{node.name()}: gradient on {grad.device}, wanted {expected.device}"
    if tuple(grad.shape) != tuple(expected.shape):
        grad = grad.sum_to_size(expected.shape)
    grad = grad.to(expected.dtype)
    slots = arrived.setdefault(node, [None] * len(node._input_metadata))
    slots[number] = grad if slots[number] is None else slots[number] + grad
