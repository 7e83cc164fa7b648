"""The networks of a benchmark: timm's, with untrained but well-behaved weights, a batch of noise, a ranking on noise.

Time, bytes and FLOPs do not depend on what the weights are; gradients that are compared must not be zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

import trady_triton.models  # noqa: F401  (registers the paper's networks with timm)
from trady_triton import Ranking, rank_layers

CLASSES = 1000


@dataclass(frozen=True)
class Net:
    """What is trained, and how: a timm model on `batch` images [3, image_size, image_size].

    `autocast` is the dtype of torch.autocast around forward and loss, None without.
    """

    name: str
    batch: int
    image_size: int
    device: str = "cpu"
    autocast: torch.dtype | None = None
    channels_last: bool = False

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Of the whole batch."""
        return self.batch, 3, self.image_size, self.image_size

    def build(self) -> nn.Module:
        """The network in train mode: no dropped paths, no branch scaled to 0, running statistics of noise."""
        if not timm.is_model(self.name):
            raise ValueError(f"unknown model {self.name!r}: timm.list_models() lists what there is")
        torch.manual_seed(0)
        options = {"img_size": self.image_size} if timm.get_pretrained_cfg_value(self.name, "fixed_input_size") else {}
        model: nn.Module = timm.create_model(self.name, num_classes=CLASSES, **options).to(self.device)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _open_branches(model)
        _calibrate(model, self.inputs(min(self.batch, 16)))
        return model.train()

    def inputs(self, batch: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Noise for images, the same at every call."""
        return _images((batch or self.batch, *self.input_shape[1:]), dtype, self.device, self.channels_last)

    def target(self, batch: int | None = None) -> Tensor:
        """Random labels."""
        generator = torch.Generator().manual_seed(2)
        return torch.randint(CLASSES, (batch or self.batch,), generator=generator).to(self.device)

    def rank(self, model: nn.Module) -> Ranking:
        """A ranking on one batch of noise."""
        size = min(self.batch, 8)
        return rank_layers(model, [(self.inputs(size), self.target(size))], cross_entropy)

    def described(self) -> dict[str, Any]:
        """The net as JSON."""
        autocast = None if self.autocast is None else str(self.autocast).removeprefix("torch.")
        return {"net": self.name, "batch": self.batch, "image_size": self.image_size, "device": self.device,
                "autocast": autocast, "channels_last": self.channels_last}  # fmt: skip

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Net:
        """Back from `described`."""
        autocast = content["autocast"]
        return cls(content["net"], content["batch"], content["image_size"], content["device"],
                   None if autocast is None else getattr(torch, autocast), content["channels_last"])  # fmt: skip


@lru_cache(maxsize=4)
def _images(shape: tuple[int, ...], dtype: torch.dtype, device: str, channels_last: bool) -> Tensor:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


@torch.no_grad()
def _open_branches(model: nn.Module) -> None:
    """Undo initialisations that make gradients zero or tiny: residual branches closed by a scale, dropped paths."""
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    for name, parameter in model.named_parameters():
        is_scale = name.endswith(("gamma", "weight")) and parameter.dim() == 1
        if is_scale and parameter.numel() and float(parameter.abs().max()) < 0.01:
            parameter.fill_(1.0)


@torch.no_grad()
def _calibrate(model: nn.Module, inputs: Tensor) -> None:
    """Give BatchNorm the statistics of a batch, so that activations stay in range in eval mode too."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
