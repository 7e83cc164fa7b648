"""What a training step really takes: bytes kept for the backward, peak memory, FLOPs by kind.

The first two count storages, not tensors: views of one storage count once. All three are exact and say the same on any
machine; under FakeTensorMode they predict a step without running it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

OUTSIDE = "outside the model"
KINDS = ("trained channels", "conv and linear", "normalisation", "activation", "other")
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_VIEWS = ("TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsafeViewBackward0",
          "ReshapeAliasBackward0", "ExpandBackward0", "SqueezeBackward1", "UnsqueezeBackward0", "SliceBackward0",
          "ToCopyBackward0")  # fmt: skip


def layer_kind(module: nn.Module) -> str:
    """The kind, one of `KINDS`, of the bytes that a module keeps."""
    if getattr(module, "slot", None) is not None:
        return "trained channels"
    if isinstance(module, _ConvNd | nn.Linear | nn.Bilinear):
        return "conv and linear"
    if isinstance(module, _NORMS):
        return "normalisation"
    files = {base.__module__.rpartition(".")[2] for base in type(module).__mro__}
    is_activation = bool(files & {"activation", "activations"}) and not isinstance(module, nn.MultiheadAttention)
    return "activation" if is_activation else "other"


class KeptBytes:
    """Bytes that the autograd graph keeps between a forward and its backward.

        with KeptBytes(model) as kept:
            loss = loss_fn(model(x), y)
        kept.total, kept.by_kind, kept.by_layer

    Counts what still lives when the block ends, so hold the loss. Parameters and buffers of the model are left out,
    its input is counted where a layer keeps it. A storage that several layers keep counts for the first of them;
    what is kept outside the model, as by the loss, counts for the layer `OUTSIDE`.
    """

    def __init__(self, model: nn.Module, kind_of: Callable[[nn.Module], str] = layer_kind) -> None:
        self.by_layer: dict[str, int] = {}
        self.by_kind: dict[str, int] = {}
        self._modules = dict(model.named_modules())
        self._kind_of = kind_of
        self._running: list[str] = []
        self._saved: list[tuple[weakref.ref[_Saved], str]] = []
        self._exits = ExitStack()
        self._owned = _storages([*model.parameters(), *model.buffers()])

    @property
    def total(self) -> int:
        """Sum over the layers."""
        return sum(self.by_layer.values())

    def __enter__(self) -> KeptBytes:
        for name, module in self._modules.items():
            self._exits.callback(module.register_forward_pre_hook(self._entering(name)).remove)
            self._exits.callback(module.register_forward_hook(self._leave, always_call=True).remove)
        self._exits.enter_context(saved_tensors_hooks(self._pack, lambda saved: saved.tensor))
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()
        kinds = {name: self._kind_of(module) for name, module in self._modules.items()} | {OUTSIDE: "other"}
        layers, by_kind = Counter[str](), Counter[str]()
        seen = set(self._owned)
        for reference, layer in self._saved:
            saved = reference()
            storage = None if saved is None else saved.tensor.untyped_storage()
            if storage is not None and storage._cdata not in seen:
                seen.add(storage._cdata)
                layers[layer] += storage.nbytes()
                by_kind[kinds[layer]] += storage.nbytes()
        self.by_layer, self.by_kind = dict(layers), dict(by_kind)

    def _entering(self, name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: self._running.append(name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # an output that kept its own graph alive would never be freed
        self._saved.append((weakref.ref(saved), self._running[-1] if self._running else OUTSIDE))
        return saved


class _Saved:
    """What the graph holds in place of a tensor: dies with the graph, which tells what is still kept."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Peak(Protocol):
    """Memory beyond what existed on entry."""

    @property
    def live_bytes(self) -> int:
        """What lives now."""

    @property
    def peak_bytes(self) -> int:
        """The most that lived at once."""


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Peak memory of a block: by counting live storages, on CUDA as its allocator says.

        with peak_memory() as memory:
            loss_fn(model(x), y).backward()
        memory.peak_bytes

    Clear gradients before the block, so that those of an older step neither exist on entry nor hide new ones.
    """
    is_real = torch.device(device).type == "cuda" and detect_fake_mode() is None  # no allocator sees a fake tensor
    meter = CudaPeak(torch.device(device)) if is_real else LiveStorages()
    with meter:
        yield meter


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of every storage that an operation makes, until it is freed.

    Sees the backward as well: autograd hands the mode to the threads where it runs. Buffers inside a single
    operation, such as oneDNN's private copies, are not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.lift_fresh.default:  # torch.tensor() calls it on what it has just made
            for tensor in _tensors((args, kwargs)):
                self._know(tensor.untyped_storage(), 0)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            self._know(storage, storage.nbytes())
        return out

    def _know(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """Count a storage that was not met before; one that is an argument first existed on entry, and counts 0."""
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        weakref.finalize(storage, self._forget, storage._cdata, nbytes).atexit = False
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= nbytes


class CudaPeak:
    """The same two figures from the CUDA allocator, which counts on the host: nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0

    def __enter__(self) -> CudaPeak:
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def live_bytes(self) -> int:
        """Allocated now, beyond the start."""
        return torch.cuda.memory_allocated(self.device) - self._before

    @property
    def peak_bytes(self) -> int:
        """Allocated at most since the start, beyond it."""
        return torch.cuda.max_memory_allocated(self.device) - self._before


class FlopsByKind(FlopCounterMode):
    """FLOPs of the block by kind, 2 a multiply-add: of the forward, of dX (dgrad) and of dW (wgrad).

        with FlopsByKind(model) as flops:
            loss_fn(model(x), y).backward()
        flops.forward_flops, flops.dgrad_flops, flops.wgrad_flops

    Each operation of a backward is sorted where it runs. A convolution's backward says by its output mask what it
    computes. A matrix product is dW if the autograd node that runs it feeds leaves alone, dX if it feeds none; a node
    that feeds both (a Linear) makes dX from the weight and dW without it. So dW of a Linear whose weight is itself
    computed (a parametrisation) counts as dX. Torch's own formula for a convolution's backward counts the dW of a
    grouped one G times, the one here does not. Layers that `torch.utils.checkpoint` repeats count as forward again,
    custom autograd functions too where a module of the model calls them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.forward_flops = self.dgrad_flops = self.wgrad_flops = 0
        self._modules = list(model.modules())
        self._running = 0
        self._exits = ExitStack()
        self._weights = _storages(model.parameters())
        self._casts: list[Tensor] = []
        formulas = {op: self._sorted(formula) for op, formula in flop_registry.items()}
        formulas[torch.ops.aten.convolution_backward] = self._sorted(self._convolution_backward, is_mixed=True)
        formulas[torch.ops.aten._to_copy] = _given_tensors(self._follow_cast)
        super().__init__(display=False, custom_mapping=formulas)

    def __enter__(self) -> FlopsByKind:
        for module in self._modules:
            self._exits.callback(module.register_forward_pre_hook(self._enter_module).remove)
            self._exits.callback(module.register_forward_hook(self._leave_module, always_call=True).remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._exits.close()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._running += 1

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running -= 1

    def _sorted(self, formula: Callable[..., Any], is_mixed: bool = False) -> Callable[..., int]:
        """The formula, which also adds to the kind of the operation."""

        def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            flops = formula(*args, out_val=out_val, **kwargs)
            if is_mixed:
                dgrad, wgrad = flops
                self.dgrad_flops += dgrad
                self.wgrad_flops += wgrad
                return int(dgrad + wgrad)
            kind = self._kind(_tensors((args, kwargs)))
            setattr(self, kind, getattr(self, kind) + flops)
            return int(flops)

        return _given_tensors(count)

    @staticmethod
    def _convolution_backward(
        dy: Tensor, x: Tensor, weight: Tensor, *args: Any, out_val: Any, **_: Any
    ) -> tuple[int, int]:
        """(dX, dW): every element of dX or dW is met once by each position of the side that the kernel slides over."""
        transposed, mask = args[4], args[7]
        positions = x.shape[0] * prod((x if transposed else dy).shape[2:])
        flops = 2 * positions * weight.numel()
        return flops * mask[0], 2 * positions * out_val[1].numel() if mask[1] else 0

    def _follow_cast(self, tensor: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
        """A copy of a weight in another dtype is a weight; it is held, so that no other tensor gets its storage."""
        if tensor.untyped_storage()._cdata in self._weights:
            self._casts.append(out_val)
            self._weights |= _storages([out_val])
        return 0

    def _kind(self, operands: list[Tensor]) -> str:
        node = torch._C._current_autograd_node()
        if node is None or torch.is_grad_enabled() or self._running:
            return "forward_flops"
        edges = [edge for edge, _ in node.next_functions if edge is not None]
        to_leaf = [_feeds_leaf(edge) for edge in edges]
        if all(to_leaf):
            return "wgrad_flops"
        uses_weight = any(tensor.untyped_storage()._cdata in self._weights for tensor in operands)
        return "wgrad_flops" if any(to_leaf) and not uses_weight else "dgrad_flops"


def _given_tensors(count: Callable[..., int]) -> Callable[..., int]:
    """A formula that FlopCounterMode calls with the tensors of an operation instead of their shapes."""

    def formula(*args: Any, **kwargs: Any) -> int:
        return count(*args, **kwargs)

    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


def _feeds_leaf(node: Any) -> bool:
    """Whether a node hands its gradient to a leaf, through views and casts at most."""
    while node.name() in _VIEWS and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return bool(node.name().endswith("AccumulateGrad"))


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors among arguments or results; written out, as a step under a meter spends its time here."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    for leaf in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ():
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, list | tuple | dict):
            found += _tensors(leaf)
    return found


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of tensors."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _storages(tensors: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}
