"""What happens to gradients between backward and step: changes are noticed, and the joint norm is clipped.

"Whole" are the gradients of parameters that are trained whole, "compact" those of the drawn channels. A loop that clips
over `model.parameters()` sees the former only.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from trady_triton.sharding import is_sharded


class GradientWatch:
    """Notes every gradient as the last backward left it, to tell at the step whether somebody changed it since.

    In-place changes raise a tensor's version, a new tensor is another object.
    """

    def __init__(self) -> None:
        self._versions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def follow(self, leaf: Tensor) -> RemovableHandle:
        """Note the gradients of a leaf from now on; the leaf does not keep the watch alive."""
        handle: RemovableHandle = leaf.register_post_accumulate_grad_hook(partial(_note, weakref.ref(self)))  # type: ignore[no-untyped-call]
        return handle

    def note(self, leaf: Tensor) -> None:
        """A backward has added to the gradient of a leaf."""
        if (grad := leaf.grad) is not None:
            self._versions[leaf] = id(grad), grad._version

    def forget(self) -> None:
        """The gradients were cleared, which is no change that anybody has to hear of."""
        self._versions.clear()

    def changes(self, leaves: Iterable[Tensor]) -> int:
        """How many times gradients were changed since: the most of any of the leaves."""
        return max((self._changes(leaf) for leaf in leaves), default=0)

    def _changes(self, leaf: Tensor) -> int:
        if leaf.grad is None or (noted := self._versions.get(leaf)) is None:  # type: ignore[no-untyped-call]
            return 0
        identity, version = noted
        return int(leaf.grad._version - version) if id(leaf.grad) == identity else 1


def _note(reference: weakref.ref[GradientWatch], leaf: Tensor) -> None:
    if (watch := reference()) is not None:
        watch.note(leaf)


def missed_compact(watch: GradientWatch, whole: Iterable[Tensor], compact: Sequence[Tensor]) -> bool:
    """Whether the whole gradients were changed after the backward, and the compact ones, which exist, were not."""
    return any(leaf.grad is not None for leaf in compact) and watch.changes(whole) > watch.changes(compact)


def unscale_(leaves: Iterable[Tensor], scale: Tensor) -> None:
    """Take the factor of a GradScaler out of the gradients of leaves."""
    for grad in (leaf.grad for leaf in leaves):
        if grad is not None:
            # On CUDA a half-precision gradient would have the scale cast to its own dtype, where 65536 is infinite.
            wide = grad.to(torch.promote_types(grad.dtype, scale.dtype))
            grad.copy_(wide / scale.to(grad.device))


def clip_jointly_(leaves: Iterable[Tensor], max_norm: float) -> None:
    """Scale the gradients of leaves such that their norm as one vector is at most `max_norm`.

    As torch's clip_grad_norm_, but of gradients of which some are sharded (DTensor) and some are not. To infinity
    nothing is done, while torch would make NaN of gradients whose norm overflows.
    """
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    if not grads or max_norm == math.inf:
        return
    scale = (max_norm / (total_norm(grads) + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.to(device=grad.device, dtype=grad.dtype))


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Their 2-norm as one vector; of sharded ones over all processes."""
    norm = get_total_norm([grad for grad in grads if not is_sharded(grad)])
    if sharded := [grad for grad in grads if is_sharded(grad)]:
        of_sharded = get_total_norm(sharded).full_tensor()  # type: ignore[attr-defined]
        norm = torch.hypot(of_sharded, norm.to(of_sharded))
    return norm
