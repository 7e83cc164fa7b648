"""What happens to gradients between backward and step: a loop's own clipping is noticed, and the joint norm clipped.

"Whole" are the gradients of parameters that are trained whole, "compact" those of the drawn channels. A loop that clips
over `model.parameters()` sees the former only.
"""

from __future__ import annotations

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

    In-place changes raise a tensor's version, a new tensor is another object. With `weighs` norms are noted as well.
    """

    def __init__(self, weighs: bool) -> None:
        self.weighs = weighs
        self._versions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._norms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def follow(self, leaf: Tensor) -> RemovableHandle:
        """Note the gradients of a leaf from now on; the leaf does not keep the watch alive."""
        handle: RemovableHandle = leaf.register_post_accumulate_grad_hook(partial(_note, weakref.ref(self)))  # type: ignore[no-untyped-call]
        return handle

    def note(self, leaf: Tensor) -> None:
        """A backward has added to the gradient of a leaf."""
        if (grad := leaf.grad) is not None:
            self._versions[leaf] = id(grad), grad._version
            if self.weighs:
                self._norms[leaf] = torch.linalg.vector_norm(grad.detach())

    def forget(self) -> None:
        """The gradients were cleared, which is no change that anybody has to hear of."""
        self._versions.clear()
        self._norms.clear()

    def changes(self, leaves: Iterable[Tensor]) -> int:
        """How many times gradients were changed since: the most of any of the leaves."""
        return max((self._changes(leaf) for leaf in leaves), default=0)

    def shrinkage(self, leaves: Iterable[Tensor]) -> Tensor | None:
        """The norm of the gradients over what it was; None where nothing was noted."""
        noted = [leaf for leaf in leaves if leaf.grad is not None and leaf in self._norms]
        if not noted:
            return None
        now = total_norm([leaf.grad for leaf in noted if leaf.grad is not None])
        return now / _joined([self._norms[leaf] for leaf in noted]).to(now)

    def _changes(self, leaf: Tensor) -> int:
        if leaf.grad is None or leaf not in self._versions:
            return 0
        identity, version = self._versions[leaf]
        return int(leaf.grad._version - version) if id(leaf.grad) == identity else 1


def _note(reference: weakref.ref[GradientWatch], leaf: Tensor) -> None:
    if (watch := reference()) is not None:
        watch.note(leaf)


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Their 2-norm as one vector; of sharded ones (DTensor) over all processes."""
    norms = [get_total_norm([grad for grad in grads if not is_sharded(grad)])]
    if sharded := [grad for grad in grads if is_sharded(grad)]:
        norms.append(get_total_norm(sharded).full_tensor())  # type: ignore[attr-defined]
    return _joined(norms)


def _joined(norms: Sequence[Tensor]) -> Tensor:
    """The norm of what has these norms."""
    joined: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[-1]) for norm in norms]))
    return joined


def clip_jointly_(
    whole: Sequence[Tensor], compact: Sequence[Tensor], max_norm: float, watch: GradientWatch | None
) -> None:
    """Scale the gradients of leaves such that the norm of all is at most `max_norm`, as clip_grad_norm_ would.

    Where the watch tells that a loop has clipped the whole gradients alone before, they are scaled from what they were
    then, and not a second time: the result is that of one clipping over all.
    """
    clipped = _clipped_alone(watch, whole, compact) if watch is not None else None
    grads = [[leaf.grad for leaf in leaves if leaf.grad is not None] for leaves in (whole, compact)]
    norms = [total_norm(part) if part else torch.tensor(0.0) for part in grads]
    device = next((grad.device for grad in grads[1] + grads[0]), torch.device("cpu"))
    norm_whole, norm_compact = (norm.to(device) for norm in norms)
    before = norm_whole if clipped is None else norm_whole / clipped.to(device)
    scale = (max_norm / (torch.hypot(before, norm_compact) + 1e-6)).clamp(max=1.0)
    for grad in grads[1]:
        grad.mul_(scale.to(grad))
    scale = scale if clipped is None else (scale / clipped.to(device)).clamp(max=1.0)
    for grad in grads[0]:
        grad.mul_(scale.to(device=grad.device, dtype=grad.dtype))


def missed_compact(watch: GradientWatch, whole: Iterable[Tensor], compact: Sequence[Tensor]) -> bool:
    """Whether the whole gradients were changed after the backward, and the compact ones, which exist, were not."""
    return any(leaf.grad is not None for leaf in compact) and watch.changes(whole) > watch.changes(compact)


def _clipped_alone(watch: GradientWatch, whole: Sequence[Tensor], compact: Sequence[Tensor]) -> Tensor | None:
    """The factor by which the whole gradients were scaled and the compact ones were not; None where there is none."""
    if not missed_compact(watch, whole, compact):
        return None
    of_whole, of_compact = watch.shrinkage(whole), watch.shrinkage(compact)
    if of_whole is None or of_compact is None:
        return None
    factor = of_whole / of_compact.to(of_whole)
    return torch.where(torch.isfinite(factor) & (factor > 0), factor, torch.ones_like(factor))
