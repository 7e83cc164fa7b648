"""Rank layers by their reweighted gradient norm (RGN), the paper's measure of what a unit of memory buys.

For input channel c of a layer: g_c = ||dW[:, c]||_2 (eq. 6), RGN_c = g_c / cost_c (eq. 7), and the layer's RGN is the
sum over its channels (eq. 8). Norms are taken step by step and added over the steps.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trady_triton.arguments import expect
from trady_triton.batch import call, check_loss, num_samples, pair
from trady_triton.cost import CostModel, LayerShape, measure_call
from trady_triton.registry import is_trainable
from trady_triton.serial import read_json, write_json


@dataclass(frozen=True)
class LayerNorms:
    """One layer that may be trained: its sizes and the raw gradient norm g_c of each input channel."""

    name: str
    shape: LayerShape
    norms: tuple[float, ...]

    def rgn(self, cost: CostModel) -> float:
        """Layer RGN (eq. 8) under a cost model."""
        return math.fsum(self.norms) / cost.channel_cost(self.shape)

    def lara(self, cost: CostModel) -> float:
        """LaRa of MeDyate (arXiv 2510.20979): the norm of the layer's gradient over what the whole layer costs.

        Exact for a ranking of one step; over several, of the summed channel norms.
        """
        return math.hypot(*self.norms) / (self.shape.in_channels * cost.channel_cost(self.shape))


@dataclass(frozen=True)
class Ranking:
    """Gradient norms of every layer that may be trained, in the order of the forward.

    `head` names the modules that are always trained and take no part, `steps` counts the batches behind the norms.
    """

    layers: tuple[LayerNorms, ...]
    head: tuple[str, ...]
    steps: int

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise ValueError(f"layer {next(name for name in names if names.count(name) > 1)!r} is ranked twice")
        for layer in self.layers:
            if len(layer.norms) != layer.shape.in_channels or not all(0 <= norm < math.inf for norm in layer.norms):
                raise ValueError(f"layer {layer.name!r}: wanted {layer.shape.in_channels} gradient norms, each finite "
                                 "and at least 0")  # fmt: skip
        if self.layers and not any(any(layer.norms) for layer in self.layers):
            raise ValueError(f"all gradient norms of {len(self.layers)} layers are 0, wanted some above 0: is the "
                             "head initialised to zero, or the loss constant?")  # fmt: skip

    def order(self, cost: CostModel | None = None) -> tuple[str, ...]:
        """Layer names, highest RGN first. The default cost is the paper's: elements, one sample."""
        cost = cost or CostModel()
        return tuple(layer.name for layer in sorted(self.layers, key=lambda layer: -layer.rgn(cost)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ranking as JSON."""
        write_json(path, "ranking", asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ranking:
        """Read a ranking that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else, or is damaged.
        """
        content = read_json(path, "ranking")
        try:
            return cls.from_dict(content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: the ranking is damaged ({error!r})") from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Ranking:
        """Rebuild from `dataclasses.asdict`, whose tuples JSON has turned into lists; more keys are passed over."""
        layers = tuple(
            LayerNorms(layer["name"], LayerShape.from_dict(layer["shape"]), tuple(layer["norms"]))
            for layer in content["layers"]
        )
        return cls(layers, tuple(content["head"]), content["steps"])

    def table(self, cost: CostModel | None = None) -> str:
        """The layers in rank order as text: channels, cost of one, RGN, its share of the whole and the running sum."""
        cost = cost or CostModel()
        by_name = {layer.name: layer for layer in self.layers}
        total = math.fsum(layer.rgn(cost) for layer in self.layers)
        width = max(len(name) for name in by_name)
        titles = f"{'rank':>4}  {'layer':<{width}}  {'channels':>8}  {'cost each':>10}"
        lines = [f"{titles}  {'RGN':>10}  {'share':>6}  {'sum':>6}"]
        running = 0.0
        for rank, name in enumerate(self.order(cost), 1):
            layer = by_name[name]
            rgn = layer.rgn(cost)
            running += rgn
            lines.append(
                f"{rank:>4}  {name:<{width}}  {layer.shape.in_channels:>8}  {cost.channel_cost(layer.shape):>10}"
                f"  {rgn:>10.3e}  {rgn / total:>6.1%}  {running / total:>6.1%}"
            )
        return "\n".join(lines)


def rank_layers(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    head: Sequence[str] | None = None,
    seed: int = 0,
) -> Ranking:
    """Measure the channel gradient norms of every Conv2d and Linear over the given batches.

    The model runs in eval mode (normalisation with its running statistics, no dropout) on the device where it is, and
    is left as it was: weights, buffers, gradients, flags and random state. A weight gradient is reduced to its channel
    norms and freed as soon as autograd has accumulated it, so no two of them live at the same time.

    Args:
        model: a network; `model(input)`, or `model(**input)` where the input is a mapping, is what the loss gets.
        batches: an iterable of (input, target); the first dimension of the first input tensor is the batch. A batch
            that is a mapping, as Transformers' collators make them, is input and target at once.
        loss_fn: `loss_fn(model(input), target)` -> a scalar; for a model that computes its loss from the labels among
            its inputs, `lambda output, batch: output.loss`.
        head: names of the modules that fine-tuning trains whole; by default what `model.get_classifier()` returns, as
            in timm, or else the last Conv2d or Linear of the forward; none where that one's weight is an
            embedding's too.
        seed: of the random state during the measurement, for losses or layers that draw.

    Raises:
        TypeError: `model` is no Module, or `head` one name instead of several.
        ValueError: no batches, or none of pairs or mappings; a loss that is no scalar; no layer that could be ranked;
            an unknown head; a norm that is not finite, or only norms of 0; a model that has a plan already.
    """
    expect("model", model, nn.Module)
    if isinstance(head, str):
        raise TypeError(f"head {head!r}: wanted a sequence of module names, such as [{head!r}]")
    if hasattr(model, "trady"):
        raise ValueError("the model has a plan already: call remove_plan(model) before it is ranked")
    layers = _candidates(model)
    if not layers:
        raise ValueError(f"no layer to rank: {type(model).__name__} has no Conv2d or Linear with a weight of its own; "
                         f"it has {_kinds_with_weights(model)}")  # fmt: skip
    with _borrowed(model, [layer.weight for layer in layers.values()], seed):
        return _Measurement(model, layers, head).run(batches, loss_fn)


class _Measurement:
    """The running sums of one call of rank_layers."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Conv2d | nn.Linear], head: Sequence[str] | None) -> None:
        self.model, self.layers, self.head = model, layers, head
        self.shapes: dict[str, LayerShape] = {}
        self.norms: dict[str, Tensor] = {}
        self.last = ""  # of all Conv2d and Linear that were called

    def run(self, batches: Iterable[Any], loss_fn: Callable[[Any, Any], Tensor]) -> Ranking:
        hooks = [
            layer.weight.register_post_accumulate_grad_hook(self._reduce(name, layer))  # type: ignore[no-untyped-call]
            for name, layer in self.layers.items()
        ]
        steps = 0
        try:
            for batch in batches:
                inputs, target = pair(batch)
                with self._shapes_recorded(inputs) if steps == 0 else torch.enable_grad():
                    loss = loss_fn(call(self.model, inputs), target)
                    check_loss(loss)
                    loss.backward()  # type: ignore[no-untyped-call]
                steps += 1
        finally:
            for hook in hooks:
                hook.remove()
        return self._ranking(steps)

    def _reduce(self, name: str, layer: nn.Conv2d | nn.Linear) -> Callable[[Tensor], None]:
        groups = getattr(layer, "groups", 1)

        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            norms = channel_norms(weight.grad, groups)
            weight.grad = None
            self.norms[name] = self.norms[name] + norms if name in self.norms else norms

        return hook

    @contextmanager
    def _shapes_recorded(self, inputs: Any) -> Iterator[None]:
        """Record the sizes of every layer during the forward of one batch; a shared weight adds up its calls."""
        batch = num_samples(inputs)
        owner = {id(layer.weight): name for name, layer in self.layers.items()}

        def record(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            assert isinstance(module, nn.Conv2d | nn.Linear)
            name = owner[id(module.weight)]
            shape = measure_call(module, args[0], y, batch)
            self.shapes[name] = self.shapes[name].joined(shape) if name in self.shapes else shape

        users = [m for m in self.model.modules() if id(getattr(m, "weight", None)) in owner]
        hooks = [module.register_forward_hook(record) for module in users]
        hooks += [
            module.register_forward_hook(partial(self._note, name))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, name: str, *_: Any) -> None:
        self.last = name

    def _ranking(self, steps: int) -> Ranking:
        if steps == 0:
            raise ValueError("batches is empty: at least one (input, target) is needed to rank layers")
        head = self._default_head() if self.head is None else tuple(self.head)
        trained_whole = _parameters_of(self.model, head)
        ranked = []
        for name, shape in self.shapes.items():
            if id(self.layers[name].weight) in trained_whole or name not in self.norms:
                continue
            norms = tuple(self.norms[name].double().tolist())
            if not all(map(math.isfinite, norms)):
                raise ValueError(f"layer {name!r}: a gradient norm is not finite; check the batches and the loss")
            ranked.append(LayerNorms(name, shape, norms))
        if not ranked:
            raise ValueError("no layer to rank: no Conv2d or Linear outside the head gets a gradient; "
                             f"{type(self.model).__name__} has {_kinds_with_weights(self.model)}")  # fmt: skip
        return Ranking(tuple(ranked), head, steps)

    def _default_head(self) -> tuple[str, ...]:
        """The classifier; none where its weight is an embedding's too, which to train would take a whole backward."""
        head = find_head(self.model, [self.last])
        whole = _parameters_of(self.model, head)
        others = [m for m in self.model.modules() if not isinstance(m, nn.Conv2d | nn.Linear)]
        tied = any(id(own) in whole for module in others for own in module.parameters(recurse=False))
        return () if tied and not hasattr(self.model, "get_classifier") else head


def channel_norms(grad: Tensor, groups: int) -> Tensor:
    """L2 norm of a dense weight gradient [O, C/G, ...] per input channel -> [C] (eq. 6)."""
    grouped = grad.view(groups, grad.shape[0] // groups, *grad.shape[1:])
    norms: Tensor = torch.linalg.vector_norm(grouped, dim=[1, *range(3, grouped.dim())])
    return norms.flatten()


def find_head(model: nn.Module, called: Sequence[str]) -> tuple[str, ...]:
    """Names of the classifier: `model.get_classifier()` as in timm, or the last of the layers in call order."""
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return tuple(called[-1:])
    found = get_classifier()
    heads = {id(module) for module in (found if isinstance(found, tuple | list) else [found])}
    return tuple(
        name for name, module in model.named_modules() if id(module) in heads and any(True for _ in module.parameters())
    )


def _candidates(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Layers of a taught type by name, one per weight; weights that an untaught module uses too are left out."""
    layers: dict[str, nn.Conv2d | nn.Linear] = {}
    foreign: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and is_trainable(module):
            if all(layer.weight is not module.weight for layer in layers.values()):
                layers[name] = module
        else:
            foreign.update(id(parameter) for parameter in module.parameters(recurse=False))
    return {name: layer for name, layer in layers.items() if id(layer.weight) not in foreign}


def _parameters_of(model: nn.Module, names: Sequence[str]) -> set[int]:
    """Ids of the parameters of the given modules."""
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(f"head {name!r}: the model has no module of that name")
    return {id(parameter) for name in names for parameter in modules[name].parameters()}


def _kinds_with_weights(model: nn.Module) -> str:
    """ "2 Embedding, 8 Conv1D"."""
    kinds = Counter(type(m).__name__ for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor))
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no weights"


@contextmanager
def _borrowed(model: nn.Module, weights: list[Tensor], seed: int) -> Iterator[None]:
    """Run a model in eval mode with gradients for `weights` alone; flags, gradients and random state come back."""
    training = {module: module.training for module in model.modules()}
    flags = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    wanted = {id(weight) for weight in weights}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        model.eval()
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(seed)
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, (flag, grad) in flags.items():
            parameter.requires_grad_(flag).grad = grad
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
