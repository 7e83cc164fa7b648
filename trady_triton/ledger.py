"""The ledger of a training step: every byte and FLOP it takes, predicted without running it, or measured on a real one.

Both sides run the same step under the same meters; the prediction does so on fake tensors, which have sizes but no
content, so it needs neither the memory nor the time of the step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from trady_triton.arguments import expect
from trady_triton.batch import Batch, Shape, num_samples, tensors
from trady_triton.meters import OUTSIDE, FlopsByKind, KeptBytes, peak_memory, storage_bytes
from trady_triton.plan import Plan
from trady_triton.rehearsal import Loss, Step, fake_copy, fake_step, slots_of, train_under, trained_by, unchanged
from trady_triton.serial import read_json, write_json


@dataclass(frozen=True)
class Ledger:
    """What one training step takes, in bytes and FLOPs.

    The step is forward, loss, backward and update of `batch_size` samples, at most `micro_batch` at a time; kept bytes
    and inference are those of one micro-batch.

    Attributes:
        kept_by_kind: bytes kept between forward and backward, by the kind of the layer that keeps them.
        kept_by_layer: the same by layer; "outside the model" is what the loss keeps.
        not_lean: those of them that are kept, outside the head, by modules whose type nobody taught: type -> layer ->
            bytes.
        weight_bytes: parameters and buffers.
        batch_bytes: inputs and targets.
        draw_bytes: ids of the drawn channels, and proxies.
        state_bytes: of the optimizer.
        compact_gradient_bytes: gradients of the drawn channels.
        whole_gradient_bytes: gradients of what is trained whole: the head, and biases and norms on request.
        peak_bytes: the most that lives at once during the step, gradients included, beyond all that existed before it:
            weights, batch, draw and optimizer state.
        inference_bytes: the same of a forward without gradients.
        forward_flops, dgrad_flops, wgrad_flops: of forward, dX and dW of the whole batch, 2 a multiply-add.
    """

    device: str
    batch_size: int
    micro_batch: int
    kept_by_kind: Mapping[str, int]
    kept_by_layer: Mapping[str, int]
    not_lean: Mapping[str, Mapping[str, int]]
    weight_bytes: int
    batch_bytes: int
    draw_bytes: int
    state_bytes: int
    compact_gradient_bytes: int
    whole_gradient_bytes: int
    peak_bytes: int
    inference_bytes: int
    forward_flops: int
    dgrad_flops: int
    wgrad_flops: int

    @property
    def kept_bytes(self) -> int:
        """All that is kept between forward and backward."""
        return sum(self.kept_by_layer.values())

    @property
    def total_bytes(self) -> int:
        """The step's peak with everything that exists before it: what `make_plan(memory=...)` promises."""
        return self.peak_bytes + self.weight_bytes + self.batch_bytes + self.draw_bytes + self.state_bytes

    def table(self) -> str:
        """The ledger as text."""
        parts = f", {self.micro_batch} at a time" if self.micro_batch < self.batch_size else ""
        lines = [f"one step of {self.batch_size} samples{parts}, {self.device}"]
        lines += [_row(name, size) for name, size in self._memory().items()]
        lines += [_row(f"  kept: {kind}", size) for kind, size in sorted(self.kept_by_kind.items(), key=_by_size)]
        untaught = {
            f"  not lean: {len(layers)} {kind}, as {next(iter(layers)) or 'the model itself'}": sum(layers.values())
            for kind, layers in self.not_lean.items()
        }
        lines += [_row(name, size) for name, size in sorted(untaught.items(), key=_by_size)]
        flops = {"forward": self.forward_flops, "dX": self.dgrad_flops, "dW": self.wgrad_flops}
        lines += [f"{'FLOPs of ' + name:<44}{count:>16,}" for name, count in flops.items()]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ledger as JSON."""
        write_json(path, "ledger", asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """Read a ledger that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else, or is damaged.
        """
        try:
            return cls(**read_json(path, "ledger"))
        except TypeError as error:
            raise ValueError(f"{path}: the ledger is damaged ({error!r})") from error

    def _memory(self) -> dict[str, int]:
        return {
            "weights and buffers": self.weight_bytes,
            "batch": self.batch_bytes,
            "drawn channels' ids": self.draw_bytes,
            "optimizer state": self.state_bytes,
            "peak of the step beyond these": self.peak_bytes,
            "in all": self.total_bytes,
            "peak of inference beyond": self.inference_bytes,
            "compact gradients": self.compact_gradient_bytes,
            "gradients of the head": self.whole_gradient_bytes,
            "kept for the backward": self.kept_bytes,
        }


def ledger(
    model: nn.Module,
    plan: Plan | None,
    input_shape: Shape,
    *,
    epoch: int = 0,
    target: Batch | None = None,
    loss_fn: Loss = F.cross_entropy,
    autocast: torch.dtype | None = None,
    micro_batch: int | None = None,
    weight_decay: float = 0.0,
    scores: Mapping[str, Tensor] | None = None,
) -> Ledger:
    """Predict a training step with the channels of an epoch, without running it; the model is not touched.

    Args:
        model: with the plan applied or not.
        plan: what is trained; None for plain training of every parameter that requires a gradient.
        input_shape: of the whole batch, [N, ...]; for a model that takes its inputs by name, a mapping of tensors, of
            which shapes and dtypes count.
        epoch: whose channels are installed.
        target: a tensor, or a mapping of tensors, of the targets' shape and dtype; by default N class labels, or of a
            mapping the inputs themselves.
        loss_fn: `loss_fn(model(inputs), target)` -> the mean over the samples.
        autocast: dtype of torch.autocast around forward and loss.
        micro_batch: samples at a time; by default the plan's.
        weight_decay: of the optimizer: it needs a copy of a gradient for a moment.
        scores: layer -> a number for each channel, for samplers that cannot draw without, as for `Plan.sample`.

    Raises:
        ValueError: the plan was made for another model, or cannot draw without scores.
    """
    expect("model", model, nn.Module)
    if plan is not None:
        expect("plan", plan, Plan)
    if micro_batch is None and plan is not None:
        micro_batch = plan.micro_batch
    channels = plan.sample(epoch, scores) if plan else {}
    with fake_copy(model) as twin:
        step = fake_step(twin, input_shape, target=target, loss_fn=loss_fn, autocast=autocast,
                         micro_batch=micro_batch)  # fmt: skip
        return _keep_books(twin, train_under(twin, plan, channels, weight_decay), step)


def measure(
    model: nn.Module,
    optimizer: Optimizer,
    inputs: Batch,
    target: Batch,
    *,
    loss_fn: Loss = F.cross_entropy,
    autocast: torch.dtype | None = None,
    micro_batch: int | None = None,
) -> Ledger:
    """Measure a real training step with the channels that the optimizer has installed.

    The step includes the update, at learning rate 0; weights, buffers, optimizer state, modes and random state are
    put back afterwards. On the CPU the peak counts live storages, on CUDA it is the allocator's.

    Args:
        model: with the optimizer's plan applied.
        optimizer: any; without a plan it measures plain training.
        inputs, target: a batch [N, ...], on the model's device: tensors, or mappings of tensors.
        loss_fn: `loss_fn(model(inputs), target)` -> the mean over the samples.
        autocast: dtype of torch.autocast around forward and loss.
        micro_batch: samples at a time; by default the plan's.

    Raises:
        RuntimeError: there are gradients, which the measurement would spoil.
    """
    expect("model", model, nn.Module)
    expect("optimizer", optimizer, Optimizer)
    if micro_batch is None:
        micro_batch = getattr(getattr(optimizer, "plan", None), "micro_batch", None)
    step = Step(inputs, target, loss_fn, autocast, micro_batch)
    with unchanged(model, optimizer):
        model.train()
        return _keep_books(model, optimizer, step)


def _keep_books(model: nn.Module, optimizer: Optimizer, step: Step) -> Ledger:
    """Run the step under one meter after another: they would change each other's figures."""
    optimizer.zero_grad()
    with KeptBytes(model) as kept:
        loss = step.forward(model)
    del loss
    with peak_memory(step.device) as peak:
        step.backward(model)
        optimizer.step()
    slots = {id(slot.proxy): slot for slot in slots_of(model)}
    compact = _grad_bytes(p for p in trained_by(optimizer) if id(p) in slots)
    whole = _grad_bytes(p for p in trained_by(optimizer) if id(p) not in slots)
    optimizer.zero_grad()
    with FlopsByKind(model) as flops:
        step.backward(model)
    optimizer.zero_grad()
    model.eval()
    with peak_memory(step.device) as inference:
        step.inference(model)
    return Ledger(
        device=step.device.type,
        batch_size=step.size,
        micro_batch=num_samples(step.part[0]),
        kept_by_kind=kept.by_kind,
        kept_by_layer=kept.by_layer,
        not_lean=_not_lean(model, kept.by_layer),
        weight_bytes=storage_bytes([*model.parameters(), *model.buffers()]),
        batch_bytes=storage_bytes([*tensors(step.inputs), *tensors(step.target)]),
        draw_bytes=storage_bytes(tensor for slot in slots.values() for tensor in (slot.channels, slot.proxy)),
        state_bytes=storage_bytes(v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)),
        compact_gradient_bytes=compact,
        whole_gradient_bytes=whole,
        peak_bytes=peak.peak_bytes,
        inference_bytes=inference.peak_bytes,
        forward_flops=flops.forward_flops,
        dgrad_flops=flops.dgrad_flops,
        wgrad_flops=flops.wgrad_flops,
    )


def _not_lean(model: nn.Module, kept: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Kept bytes of the layers outside the head whose type nobody taught: type -> layer -> bytes."""
    applied = getattr(model, "trady", None)
    if applied is None:
        return {}
    modules = dict(model.named_modules())
    lean = {OUTSIDE, *applied.classes}
    for head in applied.plan.head:
        lean.update(f"{head}.{inner}".rstrip(".") for inner, _ in modules[head].named_modules())
    found: dict[str, dict[str, int]] = {}
    for name, size in kept.items():
        if name not in lean:
            found.setdefault(type(modules[name]).__name__, {})[name] = size
    return found


def _grad_bytes(parameters: Iterable[Tensor]) -> int:
    return storage_bytes(parameter.grad for parameter in parameters if parameter.grad is not None)


def _row(name: str, size: int) -> str:
    return f"{name:<44}{size:>16,} B  {size / 2**20:>10.2f} MiB"


def _by_size(item: tuple[str, int]) -> int:
    return -item[1]
