"""The gate before any timing: a method's gradients, and what a step changes, against plain autograd.

Runs on two small samples in float64, where everything but an approximation must agree to rounding. Optimizers run in
float32, and may differ from plain autograd in the same precision by no more than four times what that differs from
float64. Drawn channels do that as well on CUDA, where kernels run: see `Gate.precisions`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn.modules.batchnorm import _BatchNorm

from trady_triton.bench.methods import Method
from trady_triton.bench.nets import Net
from trady_triton.bench.training import Setup, Training, step_of
from trady_triton.rehearsal import Step, slots_of

CONTRACTS = {
    "dense": "gradients of all that is trained equal plain autograd's; the rest stays bit for bit",
    "channels": "gradients of the drawn channels equal those columns of plain autograd's; the rest stays bit for bit",
    "approximate": "with nothing lost, gradients equal plain autograd's; else they err by 10 % or less where that is "
                   "the promise (int8); the rest stays bit for bit",
    "adapter": "starts from the net's own output; the loss moves as the gradient says; base weights stay bit for bit",
    "optimizer": "gradients equal plain autograd's, and a step changes weights",
}  # fmt: skip
ROUNDING = 1e-8
INT8_ERROR = 0.1
SINGLE_ERROR = 0.1  # at most, however far float32 is from float64
OTHER_ORDER = 1e-5  # of sums in float32, where plain gradients are nearly exact; less than TF32 would cost
SAMPLES, IMAGE_SIZE = 2, 64  # pixels at most, as whether gradients are right does not depend on them

Precision = tuple[torch.dtype, torch.dtype | None]  # of weights and inputs, and of autocast
DOUBLE: Precision = (torch.float64, None)
SINGLE: Precision = (torch.float32, None)


@dataclass(frozen=True)
class Verdict:
    """What the gate saw: relative error of the gradients and its limit; of an approximation the error as it is run.

    `why` says what is wrong; it is empty where the gate is green.
    """

    contract: str
    error: float
    limit: float
    working_error: float | None = None
    why: str = ""

    @property
    def is_green(self) -> bool:
        """Whether speed may be shown."""
        return not self.why


class Gate:
    """Checks methods on one net, made for small images; plain gradients are computed once."""

    def __init__(self, net: Net, budgets: tuple[str, str, str]) -> None:
        self.model, self.setup = _small(net, budgets)
        self._dense: dict[tuple[Precision, frozenset[str]], dict[str, Tensor]] = {}

    @cached_property
    def precisions(self) -> tuple[Precision, ...]:
        """Those in which gradients of drawn channels are compared: kernels, which run on CUDA, do not take float64.

        Autocast is one of them where plain gradients under it are right to a few percent. In a deep untrained net with
        BatchNorm they are not: rounding grows from layer to layer, until two right ways have nothing in common.
        """
        if torch.device(self.setup.net.device).type != "cuda":
            return (DOUBLE,)
        cast = (torch.float32, self.setup.net.autocast)
        is_sound = cast != SINGLE and 4 * self._rounding(cast, frozenset()) <= SINGLE_ERROR
        return (DOUBLE, SINGLE, cast) if is_sound else (DOUBLE, SINGLE)

    def forget(self) -> None:
        """Free the plain gradients; they are computed again where they are needed."""
        self._dense.clear()

    def check(self, method: Method) -> Verdict:
        """Run the method's contract; convolutions in full precision, and the same at every call.

        Raises:
            Exception: whatever the method raises.
        """
        with cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self._check_adapter(method) if method.contract == "adapter" else self._check_gradients(method)

    def _check_gradients(self, method: Method) -> Verdict:
        precisions = {"channels": self.precisions, "optimizer": (SINGLE,)}.get(method.contract, (DOUBLE,))
        seen = [self._compare(method, precision) for precision in precisions]
        worst = next((verdict for verdict in seen if not verdict.is_green), seen[0])
        if method.contract != "approximate":
            return worst
        if not method.lossless:  # it was checked as it is run
            return replace(worst, working_error=worst.error)
        return replace(worst, working_error=self._error(method, DOUBLE, lossless=False)[0])

    def _compare(self, method: Method, precision: Precision) -> Verdict:
        error, why, frozen = self._error(method, precision, lossless=True)
        limit = INT8_ERROR if method.contract == "approximate" and not method.lossless else ROUNDING
        if precision != DOUBLE:
            limit += min(4 * self._rounding(precision, frozen) + OTHER_ORDER, SINGLE_ERROR)
        if not why and not error <= limit:
            under = f" under autocast in {precision[1]}" if precision[1] else ""
            why = f"gradients err by {error:.2g} in {precision[0]}{under}, allowed are {limit:.2g}"
        return Verdict(method.contract, error, limit, None, why)

    def _rounding(self, precision: Precision, frozen: frozenset[str]) -> float:
        """How far plain gradients in a precision are from those in float64."""
        return _distance(self._plain(precision, frozen), self._plain(DOUBLE, frozen))

    def _error(self, method: Method, precision: Precision, lossless: bool) -> tuple[float, str, frozenset[str]]:
        """(relative error of all gradients together, what else is wrong, BatchNorms in eval mode)."""
        model = copy.deepcopy(self.model).to(precision[0])
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        training = method.set_up(model, self.setup, lossless)
        network = training.network or model
        training.optimizer.zero_grad()
        self._step(precision).backward(training.model)
        frozen = frozenset(n for n, m in network.named_modules() if isinstance(m, _BatchNorm) and _is_frozen(m))
        wanted, found = self._plain(precision, frozen), found_gradients(training)
        wanted = {name: pick(wanted, name, training) for name in found}
        error = _distance(found, wanted) if found else float("inf")
        training.optimizer.step()
        return error, _unlawful_changes(training, before) if found else "nothing has a gradient", frozen

    def _plain(self, precision: Precision, frozen: frozenset[str]) -> dict[str, Tensor]:
        """Gradients of every parameter in plain PyTorch, with these BatchNorms in eval mode."""
        if (precision, frozen) not in self._dense:
            model = copy.deepcopy(self.model).to(precision[0]).train().requires_grad_(True)
            for name in frozen:
                model.get_submodule(name).eval()
            self._step(precision).backward(model)
            self._dense[precision, frozen] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return self._dense[precision, frozen]

    def _step(self, precision: Precision) -> Step:
        return step_of(replace(self.setup.net, autocast=precision[1]), dtype=precision[0])

    def _check_adapter(self, method: Method) -> Verdict:
        """Output at the start, the slope of the loss along the gradient, and that the base does not move."""
        torch.manual_seed(0)
        plain = copy.deepcopy(self.model).double()
        training = method.set_up(copy.deepcopy(plain), self.setup)
        step = self._step(DOUBLE)
        state = {name: p.detach().clone() for name, p in training.model.named_parameters()}
        with torch.no_grad():
            start = float((training.model.eval()(step.inputs) - plain.eval()(step.inputs)).abs().max())
        training.begin(0)
        error = _slope_error(training, step)
        training.optimizer.step()
        why = _unlawful_changes(training, state)
        if start > ROUNDING:
            why = f"the output starts {start:.2g} away from the net's"
        elif error > 1e-3:
            why = f"the loss moves by {error:.2g} of its change more or less than the gradient says"
        return Verdict(method.contract, max(error, start), 1e-3, None, why)


def _small(net: Net, budgets: tuple[str, str, str]) -> tuple[nn.Module, Setup]:
    """The net on few small images; on images of its own size if it cannot be built for, or trained on, others."""
    few = replace(net, batch=SAMPLES)
    with contextlib.suppress(Exception):  # such as an assertion that patches of 14 pixels fit
        return _ranked(replace(few, image_size=min(net.image_size, IMAGE_SIZE)), budgets)
    return _ranked(few, budgets)


def _ranked(net: Net, budgets: tuple[str, str, str]) -> tuple[nn.Module, Setup]:
    model = net.build()
    return model, Setup(net, net.rank(model), budgets)


def found_gradients(training: Training) -> dict[str, Tensor]:
    """Gradients by name of the parameter: whole ones, and compact ones [K, O/G, ...] of the drawn channels."""
    assert training.network is not None
    found = {name: p.grad for name, p in training.network.named_parameters() if p.grad is not None}
    drawn = {f"{s.layer}.weight": s.proxy.grad for s in slots_of(training.network) if s.proxy.grad is not None}
    return {**found, **drawn}


def pick(dense: Mapping[str, Tensor], name: str, training: Training) -> Tensor:
    """The part of a dense gradient that the method computes: all of it, or dW[:, channels]."""
    assert training.network is not None
    gradient = dense[name]
    for slot in slots_of(training.network):
        if f"{slot.layer}.weight" == name:
            size = gradient.shape[1]
            grouped = gradient.view(slot.groups, gradient.shape[0] // slot.groups, *gradient.shape[1:])
            return grouped[slot.channels // size, :, slot.channels % size]
    return gradient


def _unlawful_changes(training: Training, before: Mapping[str, Tensor]) -> str:
    """What a step changed that it may not, or that it changed nothing."""
    network: Any = training.network
    slots = {f"{slot.layer}.weight": slot for slot in slots_of(network)}
    changed = 0
    for name, parameter in network.named_parameters():
        moved = (parameter.detach() != before[name]) & ~(parameter.isnan() & before[name].isnan())
        changed += int(moved.sum())
        if name in slots:
            moved = moved.view(slots[name].groups, moved.shape[0] // slots[name].groups, *moved.shape[1:]).clone()
            moved[slots[name].channels // moved.shape[2], :, slots[name].channels % moved.shape[2]] = False
        elif name in training.trained:
            continue
        if bool(moved.any()):
            return f"{name} changed, which is not trained"
    return "" if changed else "a step changed nothing"


def _slope_error(training: Training, step: Step) -> float:
    """How far the loss's change along the gradient, by 1e-5, is from what the gradient says; relative."""
    training.optimizer.zero_grad()
    step.backward(training.model)
    parameters = [p for p in training.model.parameters() if p.requires_grad and p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()  # type: ignore[union-attr]
    along = [p.grad / norm for p in parameters]  # type: ignore[operator]
    losses: list[float] = []
    with torch.no_grad():
        length = 1e-5 / float(norm)
        for sign in (1, -2):
            for parameter, direction in zip(parameters, along, strict=True):
                parameter.add_(direction, alpha=sign * length)
            losses.append(float(step.forward(training.model)))
        for parameter, direction in zip(parameters, along, strict=True):
            parameter.add_(direction, alpha=length)
    return abs((losses[0] - losses[1]) / (2 * length) / float(norm) - 1)


def _distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Norm of the difference over the norm of what is wanted, all tensors together."""
    difference = sum(float((wanted[n].double() - g.double()).square().sum()) for n, g in found.items())
    size = sum(float(wanted[name].double().square().sum()) for name in found)
    return float((difference / size) ** 0.5) if size else float("inf")


def _is_frozen(norm: nn.Module) -> bool:
    return not norm.training
