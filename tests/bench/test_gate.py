"""The gate is green for methods that keep their contract, and red for ones that do not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from trady_triton.bench import case as cases
from trady_triton.bench.case import Bench
from trady_triton.bench.gate import CONTRACTS, SINGLE, Gate
from trady_triton.bench.methods import METHODS, Method
from trady_triton.bench.nets import Net
from trady_triton.bench.rivals import partial, planned
from trady_triton.bench.training import Setup, UnavailableError

BUDGETS = ("16KiB", "64KiB", "256KiB")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Net("mobilenetv2_w035", batch=2, image_size=32), BUDGETS)


@pytest.fixture(scope="module")
def gate(bench: Bench) -> Gate:
    return bench.gate


GREEN = ("full", "full-ckpt", "head", "bias", "last", "last-lean", "pool", "pool-ckpt", "pool-int8", "pool-asi",
         "random-block", "adamw", "su", "trady-small", "trady-large", "trady-lean")  # fmt: skip


@pytest.mark.parametrize("name", GREEN)
def test_methods_keep_their_contract(gate: Gate, name: str) -> None:
    verdict = gate.check(METHODS[name])
    assert verdict.is_green, verdict.why
    assert verdict.error <= verdict.limit


def test_a_net_that_cannot_be_ranked_on_small_images_is_checked_on_its_own(monkeypatch) -> None:
    net, rank = Net("mobilenetv2_w035", batch=2, image_size=96), Net.rank

    def refuses(self, model):
        if self.image_size < 96:
            raise ValueError("a gradient norm is not finite")
        return rank(self, model)

    monkeypatch.setattr(Net, "rank", refuses)
    assert Gate(net, BUDGETS).setup.net.image_size == 96


@pytest.mark.parametrize("name", ["lora", "loha", "badam", "adamw-bnb", "adamw-torchao"])
def test_packages_keep_their_contract_where_they_are_installed(gate: Gate, name: str) -> None:
    pytest.importorskip(METHODS[name].package)
    verdict = gate.check(METHODS[name])
    assert verdict.is_green, verdict.why


def a_weight(model: nn.Module) -> nn.Parameter:
    return next(p for name, p in model.named_parameters() if name.startswith("blocks.3.") and p.dim() == 4)


def scaled(model: nn.Module, setup: Setup):
    """Full fine-tuning whose gradient of one layer is 1 % too large."""
    training = partial.full(model, setup)
    a_weight(model).register_hook(lambda grad: 1.01 * grad)
    return training


def halved(model: nn.Module, setup: Setup):
    """The pool trained dense, half the gradient of its best layer lost."""
    training = partial.pool_dense(model, setup)
    model.get_parameter(f"{setup.pool[0]}.weight").register_hook(lambda grad: grad / 2)
    return training


def doubled(model: nn.Module, setup: Setup):
    """Head only, its gradient twice what it should be."""
    training = partial.head_only(model, setup)
    model.get_classifier().weight.register_hook(lambda grad: 2 * grad)
    return training


def decaying(model: nn.Module, setup: Setup):
    """Head only, but weight decay reaches the frozen weights."""
    training = partial.head_only(model, setup)
    step = training.optimizer.step

    def step_and_decay() -> None:
        step()
        with torch.no_grad():
            a_weight(model).mul_(0.99)

    training.optimizer.step = step_and_decay
    return training


def leaking(model: nn.Module, setup: Setup):
    """TraDy, whose step also touches a channel that was not drawn."""
    training = planned.trady_lean(model, replace(setup, options={"budget": "64KiB"}))
    step, name = training.optimizer.step, training.plan.pool[0]
    undrawn = min(set(range(training.plan.shapes[name].in_channels)) - set(training.plan.sample(0)[name]))

    def step_and_leak() -> None:
        step()
        with torch.no_grad():
            weight = model.get_parameter(f"{name}.weight")
            weight[(undrawn, 0) if weight.shape[1] == 1 else (0, undrawn)] += 1.0

    training.optimizer.step = step_and_leak
    return training


def idle(model: nn.Module, setup: Setup):
    """Full fine-tuning at a learning rate of 0."""
    return partial.full(model, replace(setup, lr=0.0))


@pytest.mark.parametrize(("build", "is_green"), [(planned.trady_lean, True), (halved, False)])
def test_where_kernels_run_the_gate_runs_in_their_precision_too(bench, monkeypatch, build, is_green) -> None:
    gate = Gate(bench.net, bench.budgets)
    monkeypatch.setattr(gate, "precisions", (SINGLE,))
    verdict = gate.check(Method("single", build, "channels", {"budget": "64KiB"}))
    assert verdict.limit > 1e-5
    assert verdict.is_green == is_green, verdict


BROKEN = (
    (scaled, "dense", "gradients err"),
    (doubled, "adapter", "the loss moves"),
    (decaying, "dense", "changed, which is not trained"),
    (leaking, "channels", "changed, which is not trained"),
    (idle, "dense", "changed nothing"),
)


@pytest.mark.parametrize(("build", "contract", "why"), BROKEN)
def test_a_broken_method_is_red(gate: Gate, build, contract: str, why: str) -> None:
    verdict = gate.check(Method("broken", build, contract))
    assert not verdict.is_green
    assert why in verdict.why


def test_a_red_method_has_a_row_without_speed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.METHODS, "broken", Method("broken", scaled))
    row = bench.run("broken", 1)
    assert row["status"] == "red"
    assert "gradients err" in row["why"]
    assert not {"ms", "ratio"} & row.keys()


def failing(model: nn.Module, setup: Setup):
    raise RuntimeError("the package broke")


def refusing(model: nn.Module, setup: Setup):
    raise UnavailableError("not this network")


@pytest.mark.parametrize(
    ("method", "status", "why"),
    [
        (Method("a", failing), "failed", "RuntimeError in failing: the package broke"),
        (Method("b", refusing), "unavailable", "not this network"),
        (Method("c", partial.full, package="no_such_package"), "unavailable", "no_such_package is not installed"),
    ],
)
def test_a_method_that_cannot_run_has_a_row_that_says_why(bench, monkeypatch, method, status, why) -> None:
    monkeypatch.setitem(cases.METHODS, "x", method)
    row = bench.run("x", 1)
    assert row["status"] == status
    assert why in row["why"]


def test_a_row_holds_the_four_memory_numbers_and_what_was_predicted(bench: Bench) -> None:
    row = bench.run("trady", 1)
    assert row["status"] == "ok", row["why"]
    assert row["budget_bytes"] == 64 * 1024
    assert row["used_bytes"] <= row["budget_bytes"]
    assert row["predicted_kept_bytes"] == row["kept_bytes"]
    assert row["predicted_peak_bytes"] == row["peak_bytes"]
    assert row["peak_bytes"] >= row["inference_bytes"] > 0
    assert len(row["ms"]) == len(row["full_ms"]) == 1


def test_a_micro_batch_keeps_the_pool_and_needs_less(bench: Bench) -> None:
    whole, halves = bench.run("pool", 1, 2), bench.run("pool", 1, 1)
    assert halves["kept_bytes"] < whole["kept_bytes"]
    assert halves["inference_bytes"] < whole["inference_bytes"]
    setup = replace(bench.setup, micro_batch=1)
    assert setup.plan().pool == bench.setup.plan().pool
    assert setup.plan().cost.batch_size == 1


def test_every_method_that_the_benchmark_promises_is_in_the_table() -> None:
    promised = {
        "full", "full-ckpt", "full-compiled", "full-compiled-budget", "head", "last", "last-lean", "pool", "pool-ckpt",
        "bias", "su", "paca", "random-block", "lora", "loha", "badam", "galore", "apollo", "adamw", "adamw-torchao",
        "adamw-bnb", "pool-asi", "pool-int8", "trady-small", "trady", "trady-large", "trady-lean",
    }  # fmt: skip
    assert set(METHODS) == promised
    assert {method.contract for method in METHODS.values()} == set(CONTRACTS)
    labels = [method.label for method in METHODS.values()]
    assert len(set(labels)) == len(labels)
