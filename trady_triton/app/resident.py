"""Images decoded once and kept on the device, where small networks then train as fast as it computes.

Shapes: N images, S image size; kept as uint8 [N, 3, S, S], normalised batch by batch, float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor

from trady_triton.app.data import Data, Pictures
from trady_triton.app.loader import epoch_order


@dataclass(frozen=True)
class Split:
    """One half of a data set on a device: images [N, 3, S, S] uint8, labels [N] int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ResidentData:
    """Train and test images of a data set as one network sees them. What an epoch sees follows from (seed, epoch).

    Batches come on `device`; the images lie there too where they take less than half of its free memory.
    """

    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    @classmethod
    def decode(
        cls,
        data: Data,
        config: dict[str, Any],
        device: torch.device,
        train_per_class: int | None = None,
        test_per_class: int | None = None,
    ) -> ResidentData:
        """Decode the first so many images of every class (None: all) with a model's data configuration of timm."""
        transform = create_transform(**config, is_training=False, normalize=False)

        def split(pictures: Pictures, per_class: int | None) -> Split:
            chosen = first_of_each(pictures.labels, per_class)
            images = torch.stack([transform(pictures.open(i)) for i in chosen])
            labels = torch.tensor([pictures.labels[i] for i in chosen])
            home = device if _fits(images.nbytes, device) else torch.device("cpu")
            return Split(images.to(home), labels.to(home))

        halves = split(data.train, train_per_class), split(data.test, test_per_class)
        return cls(*halves, len(data.class_names), tuple(config["mean"]), tuple(config["std"]), device)

    def train_batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch in random order; a last, smaller one is left out."""
        order = torch.tensor(epoch_order(len(self.train.labels), seed, epoch))
        for part in order[: self.steps(batch_size) * batch_size].split(batch_size):  # type: ignore[no-untyped-call]
            yield self._batch(self.train, part)

    def test_batches(self, batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images once."""
        for part in torch.arange(len(self.test.labels)).split(batch_size):  # type: ignore[no-untyped-call]
            yield self._batch(self.test, part)

    def steps(self, batch_size: int) -> int:
        """Batches in an epoch."""
        return max(1, len(self.train.labels) // batch_size)

    def _batch(self, split: Split, indices: Tensor) -> tuple[Tensor, Tensor]:
        indices = indices.to(split.images.device)
        images, labels = split.images[indices].to(self.device), split.labels[indices].to(self.device)
        mean, std = (torch.tensor(values, device=self.device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std, labels


def _fits(nbytes: int, device: torch.device) -> bool:
    """Whether so much is less than half of what a GPU has free; on a CPU there is no other place."""
    return device.type != "cuda" or 2 * nbytes < torch.cuda.mem_get_info(device)[0]


def first_of_each(labels: tuple[int, ...], per_class: int | None) -> list[int]:
    """Indices of the first `per_class` samples of every class, in their order; of all without a number."""
    seen: dict[int, int] = {}
    chosen = []
    for index, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if per_class is None or seen[label] <= per_class:
            chosen.append(index)
    return chosen
