"""One cell of an experiment: a network fine-tuned on a data set under a strategy, and what it took."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from trady_triton import Plan, TraDyOptimizer, apply_plan, make_plan
from trady_triton.app.build import build_model, input_size, load_weights
from trady_triton.app.data import load_data
from trady_triton.app.planning import load_ranking
from trady_triton.app.resident import ResidentData
from trady_triton.app.spec import Cell, DataSet, Net
from trady_triton.app.train import evaluate, make_scheduler, train_epoch
from trady_triton.ledger import measure
from trady_triton.models import ranking_for, su_layers
from trady_triton.models.schemes import scheme_of_budget
from trady_triton.probes import NeuronVelocity, fisher_scores, gradient_scores
from trady_triton.sampling import Scores

Record = dict[str, Any]

_PROBE_BATCHES = 1  # of training images, where NEq and Velocity as published hold some out


def run_cell(cell: Cell, folder: str, device_name: str) -> Record:
    """Train a cell and return its row: what it was, its accuracy, what it kept and computed, with which versions.

    `folder` is where the files of nets and data lie. A loss that is not finite ends the run; the row says so.
    """
    device = torch.device(device_name)
    start = time.perf_counter()
    data = resident(cell.net, cell.data, folder, device)
    torch.manual_seed(cell.seed)
    model = network(cell.net, folder, data.num_classes).to(device)
    plan = plan_of(cell, model, folder)
    apply_plan(model, plan)
    optimizer = TraDyOptimizer(model.parameters(), plan, lr=cell.lr)
    row = _identity(cell, plan, device)
    try:
        row |= _Training(cell, model, optimizer, data).run()
    except ValueError as error:
        if "the loss is" not in str(error):
            raise
        row |= {"accuracy": None, "error": str(error)}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


class _Training:
    """The epochs of one cell."""

    def __init__(self, cell: Cell, model: nn.Module, optimizer: TraDyOptimizer, data: ResidentData) -> None:
        self.cell, self.model, self.optimizer, self.data = cell, model, optimizer, data
        self.velocity = NeuronVelocity(model)
        self.most_used = 0
        self.probed_batches = 0

    def run(self) -> Record:
        protocol = self.cell.protocol
        steps = self.data.steps(protocol.batch_size)
        scheduler = make_scheduler(
            self.optimizer, steps=protocol.epochs * steps, warmup_steps=round(protocol.warmup_epochs * steps)
        )
        curve, books, loss = [], {}, 0.0
        for epoch in range(protocol.epochs):
            drawn = self.optimizer.resample(epoch, self._probe(epoch))
            self.most_used = max(self.most_used, self.optimizer.plan.used(drawn))
            if epoch == 0:
                books = self._books()
            tally = train_epoch(
                self.model,
                self.optimizer,
                self._batches(epoch),
                F.cross_entropy,
                scheduler=scheduler,
                first_update=epoch * steps,
                max_grad_norm=protocol.max_grad_norm,
            )
            loss = tally.loss
            is_last, every = epoch == protocol.epochs - 1, protocol.test_every
            if is_last or (every and (epoch + 1) % every == 0):
                curve.append(round(evaluate(self.model, self.data.test_batches()), 5))
        return {"accuracy": curve[-1], "train_loss": round(loss, 5), "most_used": self.most_used,
                "probed_batches": self.probed_batches, "curve": " ".join(map(str, curve)), **books}  # fmt: skip

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.train_batches(self.cell.protocol.batch_size, self.cell.seed, epoch)

    def _probe(self, epoch: int) -> Scores | None:
        """What the strategy wants measured before it draws; the row counts the batches that this takes."""
        kind = self.optimizer.plan.strategy
        if not kind.is_probed or (kind.is_static and epoch > 0):
            return None
        scores = None
        self.model.eval()
        is_whole = kind.scores == "gradient"
        self.probed_batches += self.data.steps(self.cell.protocol.batch_size) if is_whole else _PROBE_BATCHES
        if kind.scores == "gradient":
            scores = gradient_scores(self.model, self._batches(epoch), F.cross_entropy)
        elif kind.scores == "fisher":
            scores = fisher_scores(self.model, self._few(), F.cross_entropy)
        elif kind.scores == "velocity":
            scores = self.velocity.update(self._few())
        return scores

    def _few(self) -> list[tuple[Tensor, Tensor]]:
        return [batch for batch, _ in zip(self._batches(0), range(_PROBE_BATCHES), strict=False)]

    def _books(self) -> Record:
        """Bytes and FLOPs of a step with the first draw."""
        x, y = next(self._batches(0))
        book = measure(self.model, self.optimizer, x, y)
        return {
            "kept_bytes": book.kept_bytes,
            "peak_bytes": book.peak_bytes,
            "forward_flops": book.forward_flops,
            "dgrad_flops": book.dgrad_flops,
            "wgrad_flops": book.wgrad_flops,
        }


def network(net: Net, folder: str, num_classes: int) -> nn.Module:
    """The network with its weights; the head is random."""
    model = build_model(net.name, num_classes=num_classes, image_size=net.image_size, options=dict(net.args))
    if net.weights:
        load_weights(model, str(Path(folder) / net.weights))
    return model


def plan_of(cell: Cell, model: nn.Module, folder: str) -> Plan:
    """The plan of a cell, from the ranking that its net names or that is shipped for it."""
    path, size = cell.net.ranking, cell.net.image_size
    ranking = (
        load_ranking(str(Path(folder) / path), model, input_size(model, size)) if path else ranking_for(model, size)
    )
    if ranking is None:
        raise ValueError(f"net {cell.net.name!r}: no ranking is shipped for it; name a file as `ranking`")
    options: dict[str, Any] = dict(cell.method.options)
    budget = cell.budget
    if cell.method.sampler.startswith("su"):
        options["layers"] = su_layers(cell.net.name, scheme_of_budget(cell.net.name, budget))
        budget = None  # the scheme's own: a little more than the paper's count, where depthwise channels are in it
    return make_plan(ranking, budget=budget, sampler=cell.method.sampler, seed=cell.seed, **options)


_DECODED: dict[Any, ResidentData] = {}


def resident(net: Net, data: DataSet, folder: str, device: torch.device) -> ResidentData:
    """The data set as the network sees it, decoded once a process."""
    key = (net.name, net.image_size, data, folder, device)
    if key not in _DECODED:
        probe = build_model(net.name, image_size=net.image_size, options=dict(net.args))
        config = resolve_model_data_config(probe, {"img_size": net.image_size} if net.image_size else {})
        source = load_data(data.file if data.file == "digits" else str(Path(folder) / data.file))
        _DECODED[key] = ResidentData.decode(source, config, device, data.train_per_class, data.test_per_class)
    return _DECODED[key]


def _identity(cell: Cell, plan: Plan, device: torch.device) -> Record:
    return {
        "net": cell.net.name,
        "data": cell.data.name,
        "budget": cell.budget,
        "strategy": cell.method.name,
        "lr": cell.lr,
        "seed": cell.seed,
        "plan_budget": plan.budget,
        "unit": plan.cost.unit,
        "layers": len(plan.pool),
        "epochs": cell.protocol.epochs,
        "batch_size": cell.protocol.batch_size,
        "max_grad_norm": cell.protocol.max_grad_norm,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "trady_triton": version("trady-triton"),
    }
