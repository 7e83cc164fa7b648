"""A training step laid out along its forward, on fake tensors: what each stretch of it keeps and needs.

The forward is cut at every call and return of a module. What such a stretch allocates belongs to it; the backward is
cut where the gradient of a stretch's last output arrives, and belongs to the stretches of the forward alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from trady_triton.batch import Batch, call, device_of, num_samples
from trady_triton.meters import LiveStorages
from trady_triton.microbatch import casts

Versions = list[tuple[Tensor, int]]


@dataclass
class Stretch:
    """The forward between two boundaries of calls, and its backward. All in bytes."""

    module: str  # the innermost one that runs
    kept: int = 0  # for the backward, first by this stretch
    written: int = 0  # in storages that it makes
    inference: int = 0  # most that lives meanwhile if nothing is kept
    forward: int = 0  # most that lives meanwhile if every stretch keeps what it does
    backward: int = 0  # most that lives in its backward
    arrival: int = 0  # what lives when its backward begins
    gradients: int = 0  # of what is trained in it


@dataclass
class Call:
    """One call of a module: the stretches from `start` to before `stop`. Bytes of its inputs, outputs, and before."""

    name: str
    start: int
    stop: int = 0
    inputs: int = 0
    outputs: int = 0
    unkept: int = 0  # of the inputs, what neither this nor an earlier call keeps
    before: int = 0  # what lives on entry
    is_parted: bool = False  # whether its batch can be run in parts
    is_worth_it: bool = False  # to run again, whatever it writes
    is_pure: bool = False  # it neither changes its inputs nor returns one, which the next call might change
    is_stateful: bool = False  # it changes buffers


@dataclass
class Trace:
    """The stretches and calls of one forward, in the order of entry."""

    stretches: list[Stretch] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def inference_peak(self) -> int:
        """The most that lives in a forward that keeps nothing."""
        return max(stretch.inference for stretch in self.stretches)


def trace_step(
    model: nn.Module, trained: Iterable[Tensor], inputs: Batch, autocast: torch.dtype | None = None
) -> Trace:
    """Run a forward without gradients, a forward and a backward; the model is one of `fake_copy`, under a plan.

    `trained` are the leaves that the backward reaches. The forwards run under torch.autocast in that dtype.
    """
    with _Tracer(model, trained, num_samples(inputs)) as tracer:
        with torch.no_grad(), casts(device_of(inputs), autocast):
            call(model, inputs)
        tracer.start_training()
        with saved_tensors_hooks(tracer.pack, lambda tensor: tensor):
            with casts(device_of(inputs), autocast):
                y = call(model, inputs)
            outputs = [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor) and leaf.requires_grad]
            del y
            tracer.start_backward()
            torch.autograd.backward(outputs, [torch.empty_like(leaf) for leaf in outputs])
            tracer.stop()
    return tracer.trace


class _Tracer(LiveStorages):  # type: ignore[no-untyped-call]
    """Reads the meter at every boundary."""

    def __init__(self, model: nn.Module, trained: Iterable[Tensor], samples: int) -> None:
        super().__init__()
        self._trained = list(trained)
        self.trace = Trace([Stretch("")])
        self._samples = samples
        self._model = model
        self._own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._kept: set[int] = set()
        self._written = 0
        self._running: list[tuple[Call, Versions, Versions]] = []
        self._inference: Counter[str] = Counter()
        self._arrivals: dict[Node, int] = {}
        self._current = 0
        self._is_forward = True
        self._exits = ExitStack()

    def __enter__(self) -> _Tracer:
        for name, module in self._model.named_modules():
            enter = module.register_forward_pre_hook(self._entering(name), with_kwargs=True)
            self._exits.callback(enter.remove)
            self._exits.callback(module.register_forward_hook(self._leave, with_kwargs=True).remove)
        for leaf in self._trained:
            hook = leaf.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
            self._exits.callback(hook.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._exits.close()

    def start_training(self) -> None:
        """The forward without gradients is over."""
        self._cut()
        for stretch in self.trace.stretches:
            self._inference[stretch.module] = max(self._inference[stretch.module], stretch.forward)
        self.trace = Trace([Stretch("")])

    def start_backward(self) -> None:
        """The forward is over."""
        self._cut()
        self._is_forward = False
        self._current = len(self.trace.stretches) - 1
        for stretch in self.trace.stretches:
            stretch.inference = self._inference[stretch.module]

    def stop(self) -> None:
        """The backward is over."""
        self._cut()
        self._arrivals.clear()

    def pack(self, tensor: Tensor) -> Tensor:
        """The hook for what autograd saves."""
        storage = tensor.untyped_storage()
        if self._is_forward and storage._cdata not in self._own | self._kept:
            self._kept.add(storage._cdata)
            self.trace.stretches[-1].kept += storage.nbytes()
        return tensor

    def _cut(self) -> None:
        """Credit the peak since the last boundary to the stretch that ran."""
        stretch = self.trace.stretches[-1 if self._is_forward else self._current]
        if self._is_forward:
            stretch.forward, stretch.written = self.peak_bytes, self._written
        else:
            stretch.backward = max(stretch.backward, self.peak_bytes)
        self.peak_bytes, self._written = self.live_bytes, 0

    def _know(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        self._written += nbytes if storage._cdata not in self._known else 0
        super()._know(storage, nbytes)

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._is_forward:
                self._cut()
                tensors = _tensors((args, kwargs))
                entered = Call(name, len(self.trace.stretches), before=self.live_bytes)
                entered.inputs = self._bytes(tensors, self._own)
                self.trace.calls.append(entered)
                self.trace.stretches.append(Stretch(name))
                self._running.append((entered, _versions(tensors), _versions(module.buffers())))

        return enter

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._is_forward:  # a recomputed module runs again
            return
        self._cut()
        left, inputs, buffers = self._running.pop()
        tensors = [tensor for tensor, _ in inputs]
        left.stop = len(self.trace.stretches)
        outputs = _tensors(output)
        left.outputs = self._bytes(outputs, self._own)
        left.unkept = self._bytes(tensors, self._own | self._kept)
        left.is_pure = not _are_written(inputs) and not _storages(tensors) & _storages(outputs)
        is_rebound = [id(buffer) for buffer in module.buffers()] != [id(buffer) for buffer, _ in buffers]
        left.is_stateful = is_rebound or _are_written(buffers)
        batches = [tensor.shape[:1] == (self._samples,) for tensor in (*tensors, *outputs)]
        left.is_parted = isinstance(output, Tensor) and batches[0] and batches[-1] and sum(batches) == 2
        for tensor in outputs:
            self._await(tensor.grad_fn, left.stop - 1)
        self.trace.stretches.append(Stretch(self._running[-1][0].name if self._running else ""))

    def _await(self, node: Node | None, stretch: int) -> None:
        """Let the backward of a stretch begin with that of the node which made its output."""
        if node is not None and node not in self._arrivals:
            self._arrivals[node] = stretch
            node.register_prehook(lambda gradients: self._arrive(stretch))

    def _arrive(self, stretch: int) -> None:
        self._cut()
        self._current = stretch
        self.trace.stretches[stretch].arrival = self.live_bytes

    def _accumulated(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self.trace.stretches[self._current].gradients += leaf.grad.untyped_storage().nbytes()

    def _bytes(self, tensors: list[Tensor], known: set[int]) -> int:
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        return sum(storage.nbytes() for key, storage in storages.items() if key not in known)


def _versions(tensors: Iterable[Tensor]) -> Versions:
    return [(tensor, tensor._version) for tensor in tensors]


def _are_written(versions: Versions) -> bool:
    return any(tensor._version != version for tensor, version in versions)


def _storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
