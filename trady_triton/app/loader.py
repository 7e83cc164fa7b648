"""From pictures to batches: transforms of the model's data configuration, and an order that (seed, epoch) alone decide.

Shapes: N batch, S image size; images travel as uint8 [3, S, S] and are normalised by the batch, float32 [N, 3, S, S].
"""

from __future__ import annotations

import hashlib
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trady_triton.app.data import Data, Pictures

_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Batches:
    """Train and test batches of a data set for one model.

    What epoch and step see is a pure function of (seed, epoch, step): order and augmentation alike, in any process and
    with any number of workers. Decoded images are kept in memory up to a gibibyte.
    """

    data: Data
    config: dict[str, Any]
    batch_size: int
    seed: int = 0
    augment: bool = False
    workers: int = 0

    @classmethod
    def for_model(cls, data: Data, model: nn.Module, *, image_size: int | None = None, **options: Any) -> Batches:
        """Take size, mean, deviation, crop and interpolation from what timm knows about the model."""
        config = resolve_model_data_config(model, {"img_size": image_size} if image_size else {})
        if not data.is_photo:
            config["crop_pct"] = 1.0  # small drawings reach the edge: show them whole
        return cls(data, config, **options)

    @property
    def image_size(self) -> int:
        """Height of an input in pixels; inputs are square."""
        return int(self.config["input_size"][-1])

    @property
    def train_steps(self) -> int:
        """Batches in an epoch; a last, smaller one is left out."""
        return max(1, len(self.data.train.labels) // self.batch_size)

    def train(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from `first_step` on."""
        order = epoch_order(len(self.data.train.labels), self.seed, epoch)
        keys = [(epoch, i) for i in order[first_step * self.batch_size : self.train_steps * self.batch_size]]
        return self._load(self._train_view, keys)

    def ranking(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first `count` batches of a training epoch, without augmentation."""
        order = epoch_order(len(self.data.train.labels), self.seed, 0)[: count * self.batch_size]
        return self._load(self._plain_view, [(0, i) for i in order])

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images once, in their own order."""
        return self._load(self._test_view, [(0, i) for i in range(len(self.data.test.labels))])

    @cached_property
    def _train_view(self) -> _View:
        if not self.augment:
            return self._plain_view
        return _View(self.data.train, self._transform(is_training=True), seed=self.seed)

    @cached_property
    def _plain_view(self) -> _View:
        return _View(self.data.train, self._transform(is_training=False))

    @cached_property
    def _test_view(self) -> _View:
        return _View(self.data.test, self._transform(is_training=False))

    def _transform(self, is_training: bool) -> Callable[[Image.Image], Tensor]:
        return create_transform(**self.config, is_training=is_training, normalize=False)  # type: ignore[no-any-return]

    def _load(self, view: _View, keys: list[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            view,
            self.batch_size,
            sampler=keys,
            num_workers=self.workers,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),  # else each pass would draw from the state that dropout uses
        )
        mean, std = (torch.tensor(self.config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        for images, labels in loader:
            yield (images.float() / 255 - mean) / std, labels


@dataclass
class _View(Dataset[tuple[Tensor, int]]):
    """Pictures through a transform, by (epoch, index). With a seed the transform is random, and then the decoded
    picture is kept for the next epoch; without, its result."""

    pictures: Pictures
    transform: Callable[[Image.Image], Tensor]
    seed: int | None = None
    cache: dict[int, Any] = field(default_factory=dict)
    cached_bytes: int = 0

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        label = self.pictures.labels[index]
        if self.seed is None:
            image = self._kept(index, lambda: self.transform(self.pictures.open(index)), lambda kept: kept.nbytes)
            return image, label
        picture = self._kept(index, lambda: self.pictures.open(index), lambda kept: 4 * kept.width * kept.height)
        with seeded(self.seed, epoch, index):
            return self.transform(picture), label

    def _kept(self, index: int, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        if index in self.cache:
            return self.cache[index]
        item = make()
        if self.cached_bytes + size(item) <= _CACHE_BYTES:
            self.cache[index] = item
            self.cached_bytes += size(item)
        return item


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of `count` indices that depends on (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(_derived_seed("order", seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Random numbers of torch and Python that depend on the arguments alone; both states come back afterwards.

    timm's transforms draw from the process-wide generators, so there is no generator to pass.
    """
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    value = _derived_seed("image", seed, epoch, index)
    torch.default_generator.manual_seed(value)
    random.seed(value)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)


def random_batches(
    image_size: int, num_classes: int, *, batch_size: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normal noise [N, 3, S, S] with random labels: enough for a first ranking where no data is given."""
    generator = torch.Generator().manual_seed(_derived_seed("noise", seed))
    for _ in range(steps):
        images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
        yield images, torch.randint(num_classes, (batch_size,), generator=generator)


def _derived_seed(purpose: str, *numbers: int) -> int:
    digest = hashlib.sha256(" ".join(map(str, ("trady", purpose, *numbers))).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the main one answers, when its step is complete."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
