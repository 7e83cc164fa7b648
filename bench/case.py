"""One case, a method on a net: gate first, then exact counts, then time beside full fine-tuning."""

from __future__ import annotations

import copy
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trady_triton import Plan, ledger
from trady_triton.bench.equal_memory import TIE
from trady_triton.bench.gate import Gate, Verdict
from trady_triton.bench.methods import METHODS, Method
from trady_triton.bench.nets import Net
from trady_triton.bench.training import Setup, Training, UnavailableError, step_of
from trady_triton.ledger import storage_bytes
from trady_triton.meters import FlopsByKind, KeptBytes, peak_memory
from trady_triton.rehearsal import Step, slots_of

EPOCHS = 2  # of the draws, the one that keeps most is counted
MIN_ROUNDS = 2


class Bench:
    """All methods on one net, one after another."""

    def __init__(self, net: Net, budgets: tuple[str, str, str]) -> None:
        self.net, self.budgets = net, budgets
        self.model = net.build()
        self.setup = Setup(net, net.rank(self.model), budgets)
        self.gate = Gate(net, budgets)
        self.verdicts: dict[str, Verdict] = {}
        self.whole = step_of(net)
        self.weight_bytes = storage_bytes([*self.model.parameters(), *self.model.buffers()])
        self._floors: dict[int | None, int] = {}

    def run(self, name: str, repeats: int, micro_batch: int | None = None) -> dict[str, Any]:
        """The row of a method, as JSON. Nothing that a method raises comes out of here: the row says it."""
        method, step = METHODS[name], step_of(self.net, micro_batch)
        row: dict[str, Any] = {"inference_bytes": self._floor(step)}
        try:
            if name not in self.verdicts:
                self.verdicts[name] = self.gate.check(method)
            verdict = self.verdicts[name]
            row |= {"gate": {**asdict(verdict), "is_green": verdict.is_green}}
            if not verdict.is_green:
                return row | {"status": "red", "why": verdict.why}
            return row | self._measured(method, step, repeats) | {"status": "ok"}
        except Exception as error:
            return row | failure(error)

    def _floor(self, step: Step) -> int:
        if step.micro_batch not in self._floors:
            self._floors[step.micro_batch] = inference_peak(self.model, step)
        return self._floors[step.micro_batch]

    @cached_property
    def _full(self) -> Training:
        """Full fine-tuning, to which times are compared; it has taken a step."""
        full = METHODS["full"].set_up(copy.deepcopy(self.model), self.setup)
        full.step(self.whole)
        return full

    def _measured(self, method: Method, step: Step, repeats: int) -> dict[str, Any]:
        training = method.set_up(copy.deepcopy(self.model), replace(self.setup, micro_batch=step.micro_batch))
        counts = count(training, step, self.weight_bytes, method.is_compiled)
        if training.plan is not None and step.micro_batch is None:
            counts |= self._predicted(training.plan, counts["epoch"])
        return counts | self._timed(training, step, repeats)

    def _predicted(self, plan: Plan, epoch: int) -> dict[str, Any]:
        """What the plan's ledger says of the same step, without running it."""
        book = ledger(self.model, plan, self.net.input_shape, epoch=epoch, autocast=self.net.autocast)
        return {
            "budget_bytes": plan.budget,
            "used_bytes": plan.used(plan.sample(epoch)),
            "predicted_kept_bytes": book.kept_bytes,
            "predicted_peak_bytes": book.total_bytes - book.weight_bytes - book.batch_bytes,
            "recomputed_blocks": len(plan.policy.recompute),
        }

    def _timed(self, training: Training, step: Step, repeats: int) -> dict[str, Any]:
        """Milliseconds of steps of the method, and of full fine-tuning of the whole batch, in turn; each draws anew.

        What is timed has been counted, so it has run before, and a new draw trains a micro-batch that is not timed, as
        it serves an epoch in training. Rounds end early where their ratios agree.
        """
        mine: list[float] = []
        full: list[float] = []
        for repeat in range(repeats):
            training.begin(repeat)
            if training.start_epoch is not None:
                training.step(_beginning(step, 1))
            mine.append(1e3 * seconds(training, step))
            full.append(1e3 * seconds(self._full, self.whole))
            ratios = ratios_of(mine, full)
            if agree(ratios):
                break
        return {"ms": mine, "full_ms": full, "ratio": statistics.median(ratios)}


def ratios_of(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of times that were taken in turn."""
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def agree(ratios: Sequence[float]) -> bool:
    """Whether no more rounds are needed: they lie no further apart than a tie."""
    return len(ratios) >= MIN_ROUNDS and max(ratios) <= (1 + TIE) * min(ratios)


def failure(error: Exception) -> dict[str, str]:
    """A row that says what was raised and where."""
    if isinstance(error, UnavailableError):
        return {"status": "unavailable", "why": str(error)}
    place = traceback.extract_tb(error.__traceback__)[-1]
    return {"status": "failed", "why": f"{type(error).__name__} in {place.name}: {' '.join(str(error).split())[:300]}"}


def count(
    training: Training, step: Step, plain_weight_bytes: int | None = None, is_compiled: bool = False
) -> dict[str, Any]:
    """Exact bytes of a step, of the epoch of the first few that keeps most; FLOPs where the batch is whole.

    The peak is all that the method needs beyond the net's own weights, `plain_weight_bytes`, and the batch:
    activations, gradients, optimizer state, adapters, ids of channels. Compiled code is counted by the CUDA allocator,
    or not at all.
    """
    step, device = _beginning(step, 3), step.inputs.device  # a third finds gradients and two losses, as do all after it
    epochs = range(EPOCHS) if training.start_epoch else range(1)
    kept_in = [_kept(training, step, epoch, is_compiled) for epoch in epochs]
    epoch = kept_in.index(max(kept_in))
    training.begin(epoch)
    counts: dict[str, Any] = {"epoch": epoch, "kept_bytes": kept_in[epoch], "peak_bytes": None}
    if is_compiled or step.micro_batch is not None:
        training.step(step)
    else:
        counts |= _flops(training, step)
    state, extra = state_bytes(training), _extra_bytes(training, plain_weight_bytes)  # the state exists by now
    if not is_compiled or device.type == "cuda":
        training.optimizer.zero_grad()
        with peak_memory(device) as peak:
            training.step(step)
        counts["peak_bytes"] = peak.peak_bytes + state + extra
    return counts | {"state_bytes": state, "extra_weight_bytes": extra}


def _flops(training: Training, step: Step) -> dict[str, int]:
    """FLOPs of a step by kind, which it takes."""
    training.optimizer.zero_grad()
    with FlopsByKind(training.model) as flops:
        step.backward(training.model)
    training.optimizer.step()
    return {kind: getattr(flops, kind) for kind in ("forward_flops", "dgrad_flops", "wgrad_flops")}


def _beginning(step: Step, parts: int) -> Step:
    """The step's first micro-batches."""
    inputs, target = step.first(parts * (step.micro_batch or step.size))
    return replace(step, inputs=inputs, target=target)


def _extra_bytes(training: Training, plain_weight_bytes: int | None) -> int:
    """Bytes of draws, and of weights and buffers beyond the net's own where these are known."""
    network: Any = training.network
    draws = storage_bytes(tensor for slot in slots_of(network) for tensor in (slot.channels, slot.proxy))
    if plain_weight_bytes is None:
        return draws
    return draws + max(0, storage_bytes([*network.parameters(), *network.buffers()]) - plain_weight_bytes)


def inference_peak(model: nn.Module, step: Step) -> int:
    """Peak bytes of a forward without gradients, beyond weights and batch: the floor of every step."""
    mode = model.training
    step.inference(model.eval())  # cuDNN tries algorithms with large workspaces where it meets a shape first
    with peak_memory(step.inputs.device) as memory:
        step.inference(model)
    model.train(mode)
    return memory.peak_bytes


def state_bytes(training: Training) -> int:
    """Bytes of the optimizer's state, tensors inside tensor subclasses and helper objects too."""
    optimizer: Any = training.optimizer
    states = [*getattr(optimizer, "base_optimizer", optimizer).state.values(), getattr(optimizer, "param_idx2hp", {})]
    return storage_bytes(tensor for state in states for value in state.values() for tensor in _plain(value))


def _plain(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        if not hasattr(value, "__tensor_flatten__"):
            return [value]
        return [tensor for name in value.__tensor_flatten__()[0] for tensor in _plain(getattr(value, name))]
    return [item for item in getattr(value, "__dict__", {}).values() if isinstance(item, Tensor)]


def _kept(training: Training, step: Step, epoch: int, is_compiled: bool) -> int:
    training.begin(epoch)
    training.optimizer.zero_grad()
    with KeptBytes(_shell(training.model) if is_compiled else training.model) as kept:
        loss = step.forward(training.model)
    del loss
    return kept.total


def _shell(model: nn.Module) -> nn.Module:
    """The weights of a model without its layers: hooks on those would have compiled code compiled anew."""
    shell = nn.ParameterList(model.parameters())
    for index, buffer in enumerate(model.buffers()):
        shell.register_buffer(f"buffer{index}", buffer)
    return shell


def seconds(training: Training, step: Step) -> float:
    """Wall-clock seconds of one step; of the device where there is one."""
    if step.inputs.device.type != "cuda":
        return _elapsed(lambda: training.step(step))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()  # type: ignore[no-untyped-call]
    training.step(step)
    end.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3  # type: ignore[no-untyped-call]


def _elapsed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
