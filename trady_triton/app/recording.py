"""A full fine-tuning run that records what the paper studies: norms of channels and layers, tails of gradients."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from trady_triton.app.planning import rank_on
from trady_triton.app.resident import ResidentData
from trady_triton.app.train import evaluate, make_scheduler, train_mode
from trady_triton.ranking import LayerNorms, Ranking, channel_norms
from trady_triton.serial import read_json, write_json
from trady_triton.stats import TailIndex


@dataclass(frozen=True)
class Recording:
    """One run.

    Attributes:
        ranking: norms of every channel, step by step, added over all epochs.
        epochs: layer -> the sum of its channels' norms in each epoch.
        alpha: tail index of all trained gradients together, in each epoch.
        layer_alpha: the same of each layer's weight alone.
        accuracy: on the test images after each epoch.
    """

    ranking: Ranking
    epochs: dict[str, list[float]]
    alpha: list[float]
    layer_alpha: dict[str, list[float]]
    accuracy: list[float]

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write it as JSON, with what it was."""
        write_json(path, "recording", {"about": about, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> tuple[Recording, dict[str, Any]]:
        """Read what `save` wrote, and what it was."""
        content = read_json(path, "recording")
        about = content.pop("about")
        return cls(**{**content, "ranking": Ranking.from_dict(content["ranking"])}), about


def record_run(
    model: nn.Module,
    data: ResidentData,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    max_grad_norm: float | None,
    seed: int,
) -> Recording:
    """Fine-tune every parameter by SGD without momentum (warm-up of one epoch, cosine) and record each step.

    Norms and tails are those of the gradients before clipping. The tail index sums inside a step, over as many
    neighbouring elements as the square root of their number.
    """
    first = rank_on(model, [next(data.train_batches(batch_size, seed, 0))], seed)
    recorder = _Recorder(model, first)
    optimizer = SGD(model.parameters(), lr=lr)
    steps = data.steps(batch_size)
    scheduler = make_scheduler(optimizer, steps=epochs * steps, warmup_steps=steps)
    accuracy = []
    for epoch in range(epochs):
        train_mode(model)
        recorder.start_epoch()
        for step, (x, y) in enumerate(data.train_batches(batch_size, seed, epoch), 1):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            recorder.see()
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            scheduler.step_update(epoch * steps + step)
        recorder.end_epoch()
        accuracy.append(evaluate(model, data.test_batches()))
    return recorder.result(epochs * steps, accuracy)


class _Recorder:
    """The running sums of a run."""

    def __init__(self, model: nn.Module, first: Ranking) -> None:
        self.model, self.first = model, first
        modules = dict(model.named_modules())
        self.layers = {layer.name: modules[layer.name] for layer in first.layers}
        self.sizes = {layer.name: layer.shape.weights for layer in first.layers}
        self.norms: dict[str, Tensor] = {}
        self.epochs: dict[str, list[float]] = {name: [] for name in self.layers}
        self.alpha: list[float] = []
        self.layer_alpha: dict[str, list[float]] = {name: [] for name in self.layers}

    def start_epoch(self) -> None:
        self.epoch_norms: dict[str, Tensor] = {}
        total = sum(parameter.numel() for parameter in self.model.parameters())
        self.tail = TailIndex(math.isqrt(total))
        self.tails = {name: TailIndex(max(2, math.isqrt(sizes))) for name, sizes in self.sizes.items()}

    def see(self) -> None:
        """Add the gradients that wait."""
        grads = [parameter.grad.flatten() for parameter in self.model.parameters() if parameter.grad is not None]
        self.tail.update(torch.cat(grads))
        for name, layer in self.layers.items():
            grad = layer.weight.grad
            assert isinstance(grad, Tensor)
            norms = channel_norms(grad, getattr(layer, "groups", 1)).double()
            self.epoch_norms[name] = self.epoch_norms[name] + norms if name in self.epoch_norms else norms
            self.tails[name].update(grad)

    def end_epoch(self) -> None:
        self.alpha.append(self.tail.alpha)
        for name, norms in self.epoch_norms.items():
            self.norms[name] = self.norms[name] + norms if name in self.norms else norms
            self.epochs[name].append(float(norms.sum()))
            self.layer_alpha[name].append(self.tails[name].alpha)

    def result(self, steps: int, accuracy: list[float]) -> Recording:
        layers = tuple(
            LayerNorms(layer.name, layer.shape, tuple(self.norms[layer.name].tolist())) for layer in self.first.layers
        )
        ranking = Ranking(layers, self.first.head, steps)
        return Recording(ranking, self.epochs, self.alpha, self.layer_alpha, accuracy)
